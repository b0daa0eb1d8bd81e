//! Repacks weights from GGUF's blocks into the planes that the kernels load, and back.
//!
//! Repacking moves bits and changes none: [`Packing::unpack`] gives the file's bytes back. Both directions run the same
//! tables, those of `fields.rs`, but for MXFP4, which `mxfp4.rs` does faster; what the planes hold is told in [`kernels::format`]. No I/O, no device: bytes to bytes, all
//! rows at once or some at a time, so that a large matrix need not lie twice in host memory.

mod fields;
mod mxfp4;

use std::ops::Range;

use crate::gguf::TensorType;
use fields::{Field, Plane};
use kernels::format::{Layout, MXFP4_ROWS, WeightFormat, chunk_offset};

/// Why a matrix cannot be repacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message documents the variant")]
pub enum Error {
    #[error("type {ty} is not supported for weights; supported: {}", TensorType::supported_names())]
    Unsupported { ty: TensorType },
    #[error("rows of {n_in} elements of type {ty} are not whole groups of {multiple}")]
    RowLength { ty: TensorType, n_in: usize, multiple: usize },
    #[error("row {row}, block {block}: its scale is 255, which is not a number in E8M0")]
    NanScale { row: usize, block: usize },
}

/// The kernels' name for a type; `None` if they have none.
pub const fn format_of(ty: TensorType) -> Option<WeightFormat> {
    Some(match ty {
        TensorType::F32 => WeightFormat::F32,
        TensorType::F16 => WeightFormat::F16,
        TensorType::BF16 => WeightFormat::Bf16,
        TensorType::Q4_0 => WeightFormat::Q4_0,
        TensorType::Q4_1 => WeightFormat::Q4_1,
        TensorType::Q5_0 => WeightFormat::Q5_0,
        TensorType::Q5_1 => WeightFormat::Q5_1,
        TensorType::Q8_0 => WeightFormat::Q8_0,
        TensorType::Q2_K => WeightFormat::Q2K,
        TensorType::Q3_K => WeightFormat::Q3K,
        TensorType::Q4_K => WeightFormat::Q4K,
        TensorType::Q5_K => WeightFormat::Q5K,
        TensorType::Q6_K => WeightFormat::Q6K,
        TensorType::MXFP4 => WeightFormat::Mxfp4,
        _ => return None,
    })
}

/// How one matrix of `n_out` rows of `n_in` elements is repacked.
#[derive(Clone, Debug)]
pub struct Packing {
    format: WeightFormat,
    n_in: usize,
    n_out: usize,
    /// Bytes in the file of a block of the planes: of ggml's block, or of a group of scalars.
    block_bytes: usize,
    fields: Vec<Field>,
}

/// Some bytes of what [`Packing::repack_rows`] wrote, and where they belong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The bytes.
    pub from: Range<usize>,
    /// Where they start in the repacked matrix.
    pub to: usize,
}

impl Packing {
    /// The repacking of a matrix of type `ty`.
    ///
    /// # Errors
    /// - [`Error::Unsupported`] if no kernel reads `ty`.
    /// - [`Error::RowLength`] if rows are empty or not whole blocks or, for scalar types, not whole groups of 32.
    pub fn new(ty: TensorType, n_in: usize, n_out: usize) -> Result<Self, Error> {
        let format = format_of(ty).ok_or(Error::Unsupported { ty })?;
        let multiple = format.layout().block_len;
        if n_in == 0 || !n_in.is_multiple_of(multiple) {
            return Err(Error::RowLength { ty, n_in, multiple });
        }
        let block_bytes = ty.block_bytes() * (multiple / ty.block_len());
        Ok(Self { format, n_in, n_out, block_bytes, fields: fields::of(format) })
    }

    /// The kernels' name for the type.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// Bytes of the repacked matrix: those of the file, and less than 128 of padding after each plane.
    pub fn n_bytes(&self) -> usize {
        self.layout().planes(self.n_in, self.n_out).end
    }

    /// Bytes of a row in the file.
    pub fn row_bytes(&self) -> usize {
        self.blocks_per_row() * self.block_bytes
    }

    /// [`repack_rows`](Self::repack_rows) takes so many rows or a multiple, but for the matrix's last.
    pub fn rows_together(&self) -> usize {
        if self.format == WeightFormat::Mxfp4 { MXFP4_ROWS } else { 1 }
    }

    /// Bytes that [`repack_rows`](Self::repack_rows) writes.
    pub fn rows_bytes(&self, rows: Range<usize>) -> usize {
        Plane::ALL.map(|plane| self.plane_range(plane, &rows).len()).iter().sum()
    }

    /// Looks for blocks that no kernel may see: those of MXFP4 whose scale is NaN. The OCP MX specification makes all their
    /// elements NaN, ggml decodes them to 2¹²⁷ or infinity, and no sound file has one. Scales of other types may be what
    /// they like: the arithmetic carries it on.
    ///
    /// `source` is rows of the file from row `first_row` on.
    ///
    /// # Errors
    /// [`Error::NanScale`], its row counted as `first_row` is and its block from the row's first.
    pub fn check_rows(&self, first_row: usize, source: &[u8]) -> Result<(), Error> {
        match self.format {
            WeightFormat::Mxfp4 => match mxfp4::nan_block(source) {
                Some(i) => {
                    let (row, block) = (first_row + i / self.blocks_per_row(), i % self.blocks_per_row());
                    Err(Error::NanScale { row, block })
                }
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// Repacks the whole matrix; padding is zero.
    ///
    /// # Panics
    ///
    /// If `source` is not [`row_bytes`](Self::row_bytes) for each row, or `into` not [`n_bytes`](Self::n_bytes).
    pub fn repack(&self, source: &[u8], into: &mut [u8]) {
        self.repack_rows(0..self.n_out, source, into);
    }

    /// Repacks some rows, and says which bytes of them belong where in the matrix. Ranges that cover all rows together
    /// cover all its bytes, the last with the padding.
    ///
    /// # Panics
    ///
    /// If `rows` are not rows of the matrix, or not whole [`rows_together`](Self::rows_together); if `source` is not [`row_bytes`](Self::row_bytes) for each of them, or `into` not
    /// [`rows_bytes`](Self::rows_bytes).
    pub fn repack_rows(&self, rows: Range<usize>, source: &[u8], into: &mut [u8]) -> Vec<Segment> {
        assert!(rows.start <= rows.end && rows.end <= self.n_out, "rows {rows:?} of {}", self.n_out);
        let whole = |row: usize| row.is_multiple_of(self.rows_together());
        assert!(whole(rows.start) && (whole(rows.end) || rows.end == self.n_out), "rows {rows:?} are not whole");
        assert_eq!(source.len(), rows.len() * self.row_bytes(), "bytes of {rows:?} in the file");
        assert_eq!(into.len(), self.rows_bytes(rows.clone()), "bytes of {rows:?} repacked");
        if self.format == WeightFormat::Mxfp4 {
            self.repack_mxfp4(&rows, source, into);
        } else {
            into.fill(0);
            let mut rest = into;
            for plane in Plane::ALL {
                let (bytes, after) = rest.split_at_mut(self.plane_range(plane, &rows).len());
                self.fill_plane(plane, source, bytes);
                rest = after;
            }
        }

        let (mut segments, mut at) = (Vec::new(), 0);
        for plane in Plane::ALL {
            let range = self.plane_range(plane, &rows);
            if !range.is_empty() {
                segments.push(Segment { from: at..at + range.len(), to: range.start });
            }
            at += range.len();
        }
        segments
    }

    fn repack_mxfp4(&self, rows: &Range<usize>, source: &[u8], into: &mut [u8]) {
        let (quants, scales) = into.split_at_mut(self.plane_range(Plane::Quants, rows).len());
        let n_groups = self.blocks_per_row();
        mxfp4::pack(source, n_groups, &mut quants[..rows.len() * 16 * n_groups], &mut scales[..rows.len() * n_groups]);
        quants[rows.len() * 16 * n_groups..].fill(0);
        scales[rows.len() * n_groups..].fill(0);
    }

    /// Undoes [`repack`](Self::repack).
    ///
    /// # Panics
    ///
    /// If `packed` is not [`n_bytes`](Self::n_bytes), or `into` not [`row_bytes`](Self::row_bytes) for each row.
    pub fn unpack(&self, packed: &[u8], into: &mut [u8]) {
        assert_eq!(packed.len(), self.n_bytes(), "bytes of the repacked matrix");
        assert_eq!(into.len(), self.n_out * self.row_bytes(), "bytes of the matrix in the file");
        if self.format == WeightFormat::Mxfp4 {
            let (quants, scales) = packed.split_at(self.plane_range(Plane::Quants, &(0..self.n_out)).len());
            mxfp4::unpack(quants, scales, self.blocks_per_row(), into);
            return;
        }
        into.fill(0);
        for plane in Plane::ALL {
            let bytes = &packed[self.plane_range(plane, &(0..self.n_out))];
            let per_row = self.plane_row_bytes(plane);
            if per_row == 0 {
                continue;
            }
            let mut linear = vec![0; per_row];
            for (row, out) in bytes.chunks_exact(per_row).zip(into.chunks_exact_mut(self.row_bytes())) {
                self.for_each_chunk(plane, |packed, of_row| linear[of_row].copy_from_slice(&row[packed]));
                let blocks = linear.chunks_exact(plane.block_bytes(&self.layout()));
                for (packed, file) in blocks.zip(out.chunks_exact_mut(self.block_bytes)) {
                    self.fields
                        .iter()
                        .filter(|field| field.plane == plane)
                        .for_each(|field| field.unpack(packed, file));
                }
            }
        }
    }

    fn fill_plane(&self, plane: Plane, source: &[u8], into: &mut [u8]) {
        let per_row = self.plane_row_bytes(plane);
        if per_row == 0 {
            return;
        }
        let block_bytes = plane.block_bytes(&self.layout());
        let mut fields = self.fields.iter().filter(|field| field.plane == plane);
        // Most weights of most models: no bit moves within its byte.
        if let (Some(field), None) = (fields.next(), fields.next())
            && let Some(at) = field.whole(block_bytes)
        {
            return match block_bytes {
                n if n % 16 == 0 => self.copy_plane::<16>(plane, at, source, into),
                n if n % 2 == 0 => self.copy_plane::<2>(plane, at, source, into),
                _ => self.copy_plane::<1>(plane, at, source, into),
            };
        }
        let mut linear = vec![0; per_row];
        // The padding behind the last row is no whole row, or nobody's: there are no more source rows then.
        for (row, packed_row) in source.chunks_exact(self.row_bytes()).zip(into.chunks_exact_mut(per_row)) {
            linear.fill(0);
            let blocks = linear.chunks_exact_mut(plane.block_bytes(&self.layout()));
            for (packed, file) in blocks.zip(row.chunks_exact(self.block_bytes)) {
                self.fields.iter().filter(|field| field.plane == plane).for_each(|field| field.pack(file, packed));
            }
            self.for_each_chunk(plane, |packed, of_row| packed_row[packed].copy_from_slice(&linear[of_row]));
        }
    }

    /// Fills a plane that has some bytes of each block as they stand, from byte `at` on: `N` bytes at a time, of which a block
    /// of the plane has a multiple, and no more than a chunk of 16.
    fn copy_plane<const N: usize>(&self, plane: Plane, at: usize, source: &[u8], into: &mut [u8]) {
        let block_bytes = plane.block_bytes(&self.layout());
        let is_interleaved = plane == Plane::Quants && self.layout().group_bytes() > 16;
        let n_blocks = self.blocks_per_row();
        let rows = source.chunks_exact(self.row_bytes()).zip(into.chunks_exact_mut(n_blocks * block_bytes));
        for (row, packed) in rows {
            for (i, block) in row.chunks_exact(self.block_bytes).enumerate() {
                let (pieces, _) = block[at..at + block_bytes].as_chunks::<N>();
                for (j, piece) in pieces.iter().enumerate() {
                    let start = match is_interleaved {
                        // Types whose quants are bytes have one group in a block.
                        true => chunk_offset(n_blocks, block_bytes, i, j),
                        false => i * block_bytes + j * N,
                    };
                    packed[start..start + N].copy_from_slice(piece);
                }
            }
        }
    }

    /// The pieces of a row's part of a plane: where each is in the plane, and where before the interleaving of chunks.
    fn for_each_chunk(&self, plane: Plane, mut piece: impl FnMut(Range<usize>, Range<usize>)) {
        let group_bytes = self.layout().group_bytes();
        if plane != Plane::Quants || group_bytes <= 16 {
            let all = 0..self.plane_row_bytes(plane);
            return piece(all.clone(), all);
        }
        let n_groups = self.plane_row_bytes(plane) / group_bytes;
        for group in 0..n_groups {
            for chunk in 0..group_bytes / 16 {
                let packed = chunk_offset(n_groups, group_bytes, group, chunk);
                let linear = group * group_bytes + chunk * 16;
                piece(packed..packed + 16, linear..linear + 16);
            }
        }
    }

    fn layout(&self) -> Layout {
        self.format.layout()
    }

    fn blocks_per_row(&self) -> usize {
        self.n_in / self.layout().block_len
    }

    fn plane_row_bytes(&self, plane: Plane) -> usize {
        self.blocks_per_row() * plane.block_bytes(&self.layout())
    }

    /// The bytes of `rows` in a plane of the matrix, with the padding if they are the last.
    fn plane_range(&self, plane: Plane, rows: &Range<usize>) -> Range<usize> {
        let whole = plane.range(&self.layout().planes(self.n_in, self.n_out));
        let row = |row| whole.start + row * self.plane_row_bytes(plane);
        row(rows.start)..if rows.end == self.n_out { whole.end } else { row(rows.end) }
    }
}
