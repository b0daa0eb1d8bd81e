//! Hands out the tensors of a file, each checked against what it is wanted for.

use super::{Error, LinearSpec, TensorId};
use crate::gguf::{TensorInfo, TensorType};
use std::collections::HashMap;

/// The tensors of a file by name, and which of them were asked for.
pub(super) struct Tensors<'a> {
    all: &'a [TensorInfo],
    by_name: HashMap<&'a str, usize>,
    taken: Vec<bool>,
}

/// A shape that is wanted, fastest dimension first, and what its numbers are.
#[derive(Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) shape: &'a [usize],
    pub(super) meaning: &'static str,
}

impl<'a> Tensors<'a> {
    pub(super) fn new(all: &'a [TensorInfo]) -> Self {
        let by_name = all.iter().enumerate().map(|(i, tensor)| (&*tensor.name, i)).collect();
        Self { all, by_name, taken: vec![false; all.len()] }
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// A matrix that stays as it is in device memory: any supported type.
    pub(super) fn weight(&mut self, name: &str, wanted: Wanted) -> Result<TensorId, Error> {
        let (id, ty) = self.take(name, wanted)?;
        if !ty.is_supported() {
            return Err(Error::WeightType { tensor: name.to_owned(), ty });
        }
        Ok(id)
    }

    /// A bias, a norm, sinks or a router: nobody quantizes these, and kernels read them as f32, element by element.
    pub(super) fn floats(&mut self, name: &str, wanted: Wanted) -> Result<TensorId, Error> {
        let (id, ty) = self.take(name, wanted)?;
        match ty {
            TensorType::F32 | TensorType::F16 | TensorType::BF16 => Ok(id),
            _ => Err(Error::FloatType { tensor: name.to_owned(), ty }),
        }
    }

    /// `NAME.weight` of shape `wanted`, `[n_in, n_out]`, and `NAME.bias`.
    pub(super) fn linear(
        &mut self,
        name: &str,
        n_in: usize,
        n_out: usize,
        meaning: &'static str,
    ) -> Result<LinearSpec, Error> {
        let weight = self.weight(&format!("{name}.weight"), Wanted { shape: &[n_in, n_out], meaning })?;
        let bias =
            self.floats(&format!("{name}.bias"), Wanted { shape: &[n_out], meaning: "the rows of the weight" })?;
        Ok(LinearSpec { weight, bias: Some(bias), n_in, n_out })
    }

    /// Checks that no tensor is left over: a file with more than the architecture has is of another model.
    pub(super) fn finish(self) -> Result<(), Error> {
        let mut left = self.all.iter().zip(&self.taken).filter(|(_, taken)| !**taken).map(|(tensor, _)| tensor);
        match left.next() {
            None => Ok(()),
            Some(first) => Err(Error::UnexpectedTensors { first: first.name.clone(), count: 1 + left.count() }),
        }
    }

    fn take(&mut self, name: &str, wanted: Wanted) -> Result<(TensorId, TensorType), Error> {
        let &i = self.by_name.get(name).ok_or_else(|| Error::MissingTensor { tensor: name.to_owned() })?;
        let tensor = &self.all[i];
        let mut expected = [1; 4];
        for (expected, &wanted) in expected.iter_mut().zip(wanted.shape) {
            *expected = wanted as u64;
        }
        // Dimensions of 1 that a writer left out or added make no difference.
        if tensor.dims != expected {
            return Err(Error::Shape {
                tensor: name.to_owned(),
                found: tensor.shape().to_vec(),
                expected: expected[..wanted.shape.len()].to_vec(),
                meaning: wanted.meaning,
            });
        }
        self.taken[i] = true;
        Ok((TensorId(i), tensor.ty))
    }
}
