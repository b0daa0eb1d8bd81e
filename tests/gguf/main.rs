//! Bytes to directory, blocks to numbers, files to models.

mod allocation;
mod blocks;
mod damage;
mod hostile;
mod metadata;
mod model_file;
mod parse;
