//! A region as the owner of bytes for another library: the tensors of two safetensors files become
//! Arrow buffers, without a copy. `cargo run --example hand_over`.
//!
//! A region is `AsRef<[u8]>`, so that `bytes::Bytes` can own one. `align` lets each file start where
//! numbers may start; the format aligns the tensors inside a file.

use arrow_buffer::{Buffer, ScalarBuffer};
use bytes::Bytes;
use pagestitch::{Region, best_server};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use std::error::Error;
use std::fs::{self, File};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::temp_dir().join(format!("pagestitch-tensors-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let paths = ["first", "second"].map(|name| folder.join(name));
    for (number, path) in paths.iter().enumerate() {
        let numbers: Vec<u8> = (0..1000).flat_map(|n| (n as f32 + number as f32).to_le_bytes()).collect();
        let weights = TensorView::new(Dtype::F32, vec![1000], &numbers)?;
        serialize_to_file([("weights", weights)], None, path)?;
    }

    let files = paths.iter().map(File::open).collect::<Result<Vec<_>, _>>()?;
    let region = Region::builder().name("tensors").align(64).chunks(files).build(&best_server()?)?;
    let shards: Vec<_> = region.chunk_ranges().collect();
    let bytes = Bytes::from_owner(region);

    let mut sum = 0.0;
    for shard in shards {
        let file = bytes.slice(shard.start as usize..shard.end as usize);
        let tensors = SafeTensors::deserialize(&file)?; // reads the header, and no tensor
        let weights = file.slice_ref(tensors.tensor("weights")?.data());
        let column: ScalarBuffer<f32> = Buffer::from(weights).into(); // panics if it is not aligned
        sum += column.iter().sum::<f32>();
    }
    drop(bytes); // the last buffer would have kept the region
    println!("the sum of all weights is {sum}");
    assert_eq!(sum, 2.0 * 499_500.0 + 1000.0);
    fs::remove_dir_all(folder)?;
    Ok(())
}
