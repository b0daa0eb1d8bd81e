use super::weights::Matrix;
use cuda_std::LaunchError;
use cuda_std::emulator::FaultKind;
use gamma_tests::{TestDevice, devices, normal};
use gpt_gamma::gguf::TensorType;
use kernels::embed::run;

#[test]
fn every_type_decodes_to_the_reference_bits() {
    for &ty in TensorType::SUPPORTED {
        // One block; a last run of groups that is not full; GPT-2's width.
        let block_len = ty.block_len().max(32);
        for d_model in [block_len, 9 * block_len, 768] {
            check(&Matrix::random(ty, d_model, 5, 1), &[4, 0, 4, 2]);
        }
    }
}

#[test]
fn scales_of_any_bits_decode_to_the_reference_bits() {
    for &ty in TensorType::SUPPORTED {
        check(&Matrix::any(ty, 256, 40, 2), &(0..40).collect::<Vec<_>>());
    }
}

#[test]
fn every_exponent_of_mxfp4_decodes_to_the_reference_bits() {
    let mut table = Matrix::any(TensorType::MXFP4, 32, 256, 3);
    for (e, block) in table.bytes.chunks_exact_mut(17).enumerate() {
        block[0] = e as u8;
    }
    check(&table, &(0..256).collect::<Vec<_>>());
}

#[test]
fn positions_are_added_from_the_state_on() {
    let table = Matrix::random(TensorType::Q8_0, 64, 7, 4);
    let (positions, weight) = (normal(5, 10 * 64), table.decoded());
    let (tokens, start) = ([6, 1, 3], 5);
    for device in devices() {
        let found = embed(&device, &table, &tokens, &positions, start).unwrap();
        for (t, &token) in tokens.iter().enumerate() {
            for c in 0..64 {
                let position = positions[(start as usize + t) * 64 + c];
                assert_eq!(found[t * 64 + c], weight[token as usize * 64 + c] + position, "token {t}, channel {c}");
            }
        }
    }
}

#[test]
fn token_past_the_vocabulary_faults() {
    let table = Matrix::random(TensorType::Q4_0, 64, 7, 6);
    // A trap would end the GPU's context, and with it all other tests.
    for device in devices().into_iter().filter(|device| !device.is_gpu()) {
        let Err(LaunchError::Fault(fault)) = embed(&device, &table, &[7], &[], 0) else { panic!("no fault") };
        assert!(matches!(fault.kind, FaultKind::OutOfBounds { .. }), "{fault}");
    }
}

#[test]
fn position_past_the_context_faults() {
    let table = Matrix::random(TensorType::Q4_0, 64, 7, 6);
    for device in devices().into_iter().filter(|device| !device.is_gpu()) {
        let Err(LaunchError::Fault(fault)) = embed(&device, &table, &[1, 2], &vec![0.0; 4 * 64], 3) else {
            panic!("no fault")
        };
        assert!(matches!(fault.kind, FaultKind::OutOfBounds { .. }), "{fault}");
    }
}

#[track_caller]
fn check(table: &Matrix, tokens: &[u32]) {
    let weight = table.decoded();
    for device in devices() {
        let found = embed(&device, table, tokens, &[], 0).unwrap();
        for (t, &token) in tokens.iter().enumerate() {
            let expected = &weight[token as usize * table.n_in..][..table.n_in];
            for (c, (&found, &expected)) in found[t * table.n_in..].iter().zip(expected).enumerate() {
                let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
                assert!(same, "{}, token {token}, channel {c}: found {found:e}, expected {expected:e}", table.ty);
            }
        }
    }
}

fn embed(
    device: &TestDevice,
    table: &Matrix,
    tokens: &[u32],
    positions: &[f32],
    start: u32,
) -> Result<Vec<f32>, LaunchError> {
    let (n_tokens, d_model) = (tokens.len(), table.n_in);
    let (out, weight) = (device.poisoned(n_tokens * d_model), table.upload(device));
    let (tokens, positions, state) = (device.upload(tokens), device.upload(positions), device.upload(&[start]));
    // SAFETY: shapes as the kernel's comment says.
    unsafe {
        run(
            table.format(),
            device.launcher(),
            out.slice(),
            weight.slice(),
            tokens.slice(),
            positions.slice(),
            state.slice(),
            n_tokens as u32,
            d_model as u32,
            table.n_out as u32,
        )?;
    }
    Ok(out.to_vec().unwrap())
}
