//! The element types of ggml: numbers, names and block sizes.

use std::fmt;

macro_rules! tensor_types {
    ($($name:ident $id:literal: $block_len:literal elements, $block_bytes:literal bytes;)+) => {
        /// An element type of ggml, under ggml's name.
        ///
        /// Every number in use has its variant, also those that this engine cannot run: a message can then name them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[expect(non_camel_case_types, reason = "ggml's own names")]
        #[allow(missing_docs, reason = "sizes and layouts are told by the methods and by `decode`")]
        pub enum TensorType { $($name),+ }

        impl TensorType {
            /// Every type, by rising number.
            pub const ALL: &[Self] = &[$(Self::$name),+];
            /// The highest number in use.
            pub const MAX_ID: u32 = Self::ALL[Self::ALL.len() - 1].id();

            /// The number that stands for the type in files.
            pub const fn id(self) -> u32 {
                match self { $(Self::$name => $id),+ }
            }

            /// The type that `id` stands for; `None` if it was removed or never existed.
            pub const fn from_id(id: u32) -> Option<Self> {
                match id { $($id => Some(Self::$name),)+ _ => None }
            }

            /// How many consecutive elements of a row one block holds.
            pub const fn block_len(self) -> usize {
                match self { $(Self::$name => $block_len),+ }
            }

            /// How many bytes one block takes.
            pub const fn block_bytes(self) -> usize {
                match self { $(Self::$name => $block_bytes),+ }
            }

            /// ggml's name, such as `Q4_K`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name)),+ }
            }
        }
    };
}

// Q8_1 and Q8_K are activations and never in files. Sizes: ggml-common.h of llama.cpp b11434.
tensor_types! {
    F32 0: 1 elements, 4 bytes;
    F16 1: 1 elements, 2 bytes;
    Q4_0 2: 32 elements, 18 bytes;
    Q4_1 3: 32 elements, 20 bytes;
    Q5_0 6: 32 elements, 22 bytes;
    Q5_1 7: 32 elements, 24 bytes;
    Q8_0 8: 32 elements, 34 bytes;
    Q8_1 9: 32 elements, 36 bytes;
    Q2_K 10: 256 elements, 84 bytes;
    Q3_K 11: 256 elements, 110 bytes;
    Q4_K 12: 256 elements, 144 bytes;
    Q5_K 13: 256 elements, 176 bytes;
    Q6_K 14: 256 elements, 210 bytes;
    Q8_K 15: 256 elements, 292 bytes;
    IQ2_XXS 16: 256 elements, 66 bytes;
    IQ2_XS 17: 256 elements, 74 bytes;
    IQ3_XXS 18: 256 elements, 98 bytes;
    IQ1_S 19: 256 elements, 50 bytes;
    IQ4_NL 20: 32 elements, 18 bytes;
    IQ3_S 21: 256 elements, 110 bytes;
    IQ2_S 22: 256 elements, 82 bytes;
    IQ4_XS 23: 256 elements, 136 bytes;
    I8 24: 1 elements, 1 bytes;
    I16 25: 1 elements, 2 bytes;
    I32 26: 1 elements, 4 bytes;
    I64 27: 1 elements, 8 bytes;
    F64 28: 1 elements, 8 bytes;
    IQ1_M 29: 256 elements, 56 bytes;
    BF16 30: 1 elements, 2 bytes;
    TQ1_0 34: 256 elements, 54 bytes;
    TQ2_0 35: 256 elements, 66 bytes;
    MXFP4 39: 32 elements, 17 bytes;
    NVFP4 40: 64 elements, 36 bytes;
    Q1_0 41: 128 elements, 18 bytes;
    Q2_0 42: 64 elements, 18 bytes;
}

impl TensorType {
    /// The types that weights may have: those that [`decode`](super::decode) and the kernels understand.
    pub const SUPPORTED: &[Self] = &[
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::MXFP4,
    ];

    /// Whether a weight may have this type.
    pub fn is_supported(self) -> bool {
        Self::SUPPORTED.contains(&self)
    }

    /// The names of the supported types, for messages: `F32, F16, …`.
    pub fn supported_names() -> String {
        Self::SUPPORTED.iter().map(|ty| ty.name()).collect::<Vec<_>>().join(", ")
    }

    /// What `id` stood for before ggml removed it.
    pub const fn removed(id: u32) -> Option<&'static str> {
        Some(match id {
            4 => "Q4_2",
            5 => "Q4_3",
            31 => "Q4_0_4_4",
            32 => "Q4_0_4_8",
            33 => "Q4_0_8_8",
            36 => "IQ4_NL_4_4",
            37 => "IQ4_NL_4_8",
            38 => "IQ4_NL_8_8",
            _ => return None,
        })
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
