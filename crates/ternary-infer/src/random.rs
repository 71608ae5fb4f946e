//! Models with random weights, for tests and benchmarks.

use half::f16;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use std::collections::BTreeMap;
use ternary_format::{Encoding, Family, FormatError, ModelSpec, PackedModel, Tensor};

/// Creates a model whose matrices have the encoding `matrices(columns)`. `table` is the encoding of the token embedding and
/// the head.
///
/// A third of the ternary codes are zero. Scales differ by row, and keep activations near one, so that logits have the
/// magnitude of those of a trained model.
///
/// # Errors
/// `RowLength`: rows do not fit the blocks of an encoding. `ReadOnly`: an encoding that cannot be written.
pub fn model(
    spec: &ModelSpec,
    matrices: impl Fn(usize) -> Encoding,
    table: Encoding,
    seed: u64,
) -> Result<PackedModel, FormatError> {
    let mut random = Random { rng: ChaCha8Rng::seed_from_u64(seed), tensors: BTreeMap::new() };
    let (d, d_ff, vocab) = (spec.d_model, spec.d_ff, spec.vocab_size);
    let kv = spec.n_kv_heads * spec.head_dim();
    let gpt2 = spec.family == Family::Gpt2;
    random.matrix("token_embd", [vocab, d], table)?;
    if gpt2 {
        random.matrix("position_embd", [spec.context, d], Encoding::F32)?;
    }
    if !spec.tied {
        random.matrix("output", [vocab, d], table)?;
    }
    random.norm("output_norm", d, gpt2)?;
    for layer in 0..spec.n_layers {
        let name = |part: &str| format!("blk.{layer}.{part}");
        random.norm(&name("attn_norm"), d, gpt2)?;
        random.norm(&name("ffn_norm"), d, gpt2)?;
        if spec.family == Family::Bitnet {
            random.norm(&name("attn_sub_norm"), d, false)?;
            random.norm(&name("ffn_sub_norm"), d_ff, false)?;
        }
        let mut linears =
            vec![("attn_q", [d, d]), ("attn_k", [kv, d]), ("attn_v", [kv, d]), ("attn_output", [d, d])];
        linears.extend(spec.is_gated().then_some(("ffn_gate", [d_ff, d])));
        linears.extend([("ffn_up", [d_ff, d]), ("ffn_down", [d, d_ff])]);
        for (part, [rows, cols]) in linears {
            random.matrix(&name(part), [rows, cols], matrices(cols))?;
            if gpt2 {
                random.vector(format!("{}.bias", name(part)), rows, 0.0)?;
            }
        }
    }
    Ok(PackedModel::new("random", spec.clone(), random.tensors))
}

struct Random {
    rng: ChaCha8Rng,
    tensors: BTreeMap<String, Tensor>,
}

impl Random {
    /// A random number from -1 to 1.
    fn number(&mut self) -> f32 {
        self.rng.next_u32() as i32 as f32 / i32::MAX as f32
    }

    fn vector(&mut self, name: String, len: usize, mean: f32) -> Result<(), FormatError> {
        let values: Vec<f32> = (0..len).map(|_| mean + 0.2 * self.number()).collect();
        self.tensors.insert(name, Tensor::f32(&[len], &values)?);
        Ok(())
    }

    fn norm(&mut self, name: &str, len: usize, bias: bool) -> Result<(), FormatError> {
        self.vector(format!("{name}.weight"), len, 1.0)?;
        if bias { self.vector(format!("{name}.bias"), len, 0.0) } else { Ok(()) }
    }

    fn matrix(
        &mut self,
        name: &str,
        [rows, cols]: [usize; 2],
        encoding: Encoding,
    ) -> Result<(), FormatError> {
        let spread = 1.0 / (cols as f32).sqrt();
        let tensor = if encoding.is_ternary() {
            let mut bytes = vec![0; cols];
            Tensor::from_codes(encoding, rows, cols, |_, codes, scales| {
                self.rng.fill_bytes(&mut bytes);
                codes.iter_mut().zip(&bytes).for_each(|(code, byte)| *code = (byte % 3) as i8 - 1);
                let scale = f16::from_f32(spread * (1.2 + 0.3 * self.number()));
                scales.fill(scale);
            })?
        } else {
            let values: Vec<f32> = (0..rows * cols).map(|_| 1.7 * spread * self.number()).collect();
            Tensor::f32(&[rows, cols], &values)?.encode(encoding)?
        };
        self.tensors.insert(format!("{name}.weight"), tensor);
        Ok(())
    }
}
