//! The layers of a decoder: one function per layer.

use super::{
    graph::{Element, GraphBuilder, Value, float, int, ints, signed, text},
    weight::{self, Table, floats},
};
use crate::{
    Activation, Encoding, Family, FormatError, ModelSpec, PackedModel, Tensor, WeightType, WriteOptions,
};

/// A model that is being written to a graph.
pub(super) struct Decoder<'a> {
    model: &'a PackedModel,
    weight_type: WeightType,
    table: Table,
    /// Added to attention scores: 0 where a query may attend, very negative elsewhere. `[batch, 1, seq, total]`
    attention_bias: Value,
    /// Cosines and sines of the RoPE angles, `[batch, 1, seq, head_dim / 2]`; `None` in gpt2.
    rotary: Option<[Value; 2]>,
}

impl<'a> Decoder<'a> {
    pub fn new(
        model: &'a PackedModel,
        weight_type: WeightType,
        graph: &mut GraphBuilder,
        options: &WriteOptions,
        [ids, mask, positions]: [&Value; 3],
    ) -> Result<Self, FormatError> {
        graph.scope = "token_embd".into();
        let table = table(graph, &model.tensors["token_embd.weight"], options)?;
        graph.scope = "mask".into();
        let attention_bias = attention_bias(graph, ids, mask);
        graph.scope = "rotary".into();
        let rotary = match model.spec.family {
            Family::Gpt2 => None,
            Family::Llama | Family::Bitnet => Some(rotary_cos_sin(graph, &model.spec, positions)?),
        };
        Ok(Self { model, weight_type, table, attention_bias, rotary })
    }

    fn spec(&self) -> &'a ModelSpec {
        &self.model.spec
    }

    /// A vector of the model, such as the weight of a norm, under its own name.
    fn vector(&self, graph: &mut GraphBuilder, kind: &str) -> Result<Value, FormatError> {
        let name = format!("{}.{kind}", graph.scope);
        let tensor = &self.model.tensors[&name];
        floats(graph, &name, tensor.shape(), values(tensor))
    }

    /// Token embedding, plus learned positions in gpt2.
    ///
    /// # Shapes
    /// `[batch, seq]` to `[batch, seq, d_model]`
    pub fn embed(
        &mut self,
        graph: &mut GraphBuilder,
        ids: &Value,
        positions: &Value,
    ) -> Result<Value, FormatError> {
        graph.scope = "token_embd".into();
        let hidden = self.table.rows(graph, ids);
        let Some(table) = self.model.tensors.get("position_embd.weight") else {
            return Ok(hidden);
        };
        graph.scope = "position_embd".into();
        let table = floats(graph, "position_embd.weight", table.shape(), values(table))?;
        let positions = graph.op("Gather", &[&table, positions], &[int("axis", 0)]);
        Ok(graph.op("Add", &[&hidden, &positions], &[]))
    }

    /// A transformer block. Also returns its new KV cache.
    pub fn block(
        &self,
        graph: &mut GraphBuilder,
        index: usize,
        input: &Value,
        past: &[Value; 2],
    ) -> Result<(Value, [Value; 2]), FormatError> {
        let at = |part: &str| format!("blk.{index}.{part}");
        let normed = self.norm(graph, &at("attn_norm"), input)?;
        let (mixed, present) = self.attention(graph, index, &normed, past)?;
        let hidden = graph.op("Add", &[input, &mixed], &[]);
        let normed = self.norm(graph, &at("ffn_norm"), &hidden)?;
        let fed = self.feed_forward(graph, index, &normed)?;
        Ok((graph.op("Add", &[&hidden, &fed], &[]), present))
    }

    /// Final norm and output head.
    ///
    /// # Shapes
    /// `[batch, seq, d_model]` to `[batch, seq, vocab]`
    pub fn head(
        &self,
        graph: &mut GraphBuilder,
        hidden: &Value,
        options: &WriteOptions,
    ) -> Result<Value, FormatError> {
        let normed = self.norm(graph, "output_norm", hidden)?;
        graph.scope = "output".into();
        match self.model.tensors.get("output.weight") {
            Some(head) => Ok(table(graph, head, options)?.matmul(graph, &normed)),
            None => Ok(self.table.matmul(graph, &normed)),
        }
    }

    /// `x W^T`, plus the bias in gpt2.
    fn linear(&self, graph: &mut GraphBuilder, name: &str, input: &Value) -> Result<Value, FormatError> {
        graph.scope = name.into();
        let matrix = &self.model.tensors[&format!("{name}.weight")];
        let product =
            weight::matmul(graph, input, matrix, self.weight_type).map_err(|error| error.in_tensor(name))?;
        if self.spec().family != Family::Gpt2 {
            return Ok(product);
        }
        let bias = self.vector(graph, "bias")?;
        Ok(graph.op("Add", &[&product, &bias], &[]))
    }

    /// LayerNorm in gpt2, else RMSNorm: `x / sqrt(mean(x^2) + eps) * w`.
    fn norm(&self, graph: &mut GraphBuilder, name: &str, input: &Value) -> Result<Value, FormatError> {
        graph.scope = name.into();
        let weight = self.vector(graph, "weight")?;
        let eps = self.spec().norm_eps;
        if self.spec().family == Family::Gpt2 {
            let bias = self.vector(graph, "bias")?;
            let attributes = [signed("axis", -1), float("epsilon", eps)];
            return Ok(graph.op("LayerNormalization", &[input, &weight, &bias], &attributes));
        }
        let (two, eps, last) = (graph.float(2.0), graph.float(eps), graph.ints(&[-1]));
        let square = graph.op("Pow", &[input, &two], &[]);
        let mean = graph.op("ReduceMean", &[&square, &last], &[]);
        let mean = graph.op("Add", &[&mean, &eps], &[]);
        let root = graph.op("Sqrt", &[&mean], &[]);
        let unit = graph.op("Div", &[input, &root], &[]);
        Ok(graph.op("Mul", &[&unit, &weight], &[]))
    }

    /// Attention of the new tokens over the KV cache and themselves.
    fn attention(
        &self,
        graph: &mut GraphBuilder,
        index: usize,
        input: &Value,
        past: &[Value; 2],
    ) -> Result<(Value, [Value; 2]), FormatError> {
        let spec = self.spec();
        let (heads, kv_heads) = (spec.n_heads as i64, spec.n_kv_heads as i64);
        let head_dim = spec.head_dim() as i64;
        let at = |part: &str| format!("blk.{index}.{part}");
        // [batch, seq, width] to [batch, heads, seq, head_dim]
        let mut projected = |part: &str, heads: i64| {
            let value = self.linear(graph, &at(part), input)?;
            let shape = graph.ints(&[0, 0, heads, head_dim]);
            let value = graph.op("Reshape", &[&value, &shape], &[]);
            Ok::<_, FormatError>(graph.op("Transpose", &[&value], &[ints("perm", &[0, 2, 1, 3])]))
        };
        let query = projected("attn_q", heads)?;
        let key = projected("attn_k", kv_heads)?;
        let value = projected("attn_v", kv_heads)?;

        graph.scope = at("attn");
        let query = self.rotate(graph, query);
        let key = self.rotate(graph, key);
        let key = graph.op("Concat", &[&past[0], &key], &[int("axis", 2)]);
        let value = graph.op("Concat", &[&past[1], &value], &[int("axis", 2)]);

        // Grouped-query attention: the query heads of a group become rows of one product with their shared keys, so
        // keys and values are not repeated.
        let by_kv_head = graph.ints(&[0, kv_heads, -1, head_dim]);
        let query = graph.op("Reshape", &[&query, &by_kv_head], &[]);
        let scale = graph.float((head_dim as f32).sqrt().recip());
        let query = graph.op("Mul", &[&query, &scale], &[]);
        let transposed = graph.op("Transpose", &[&key], &[ints("perm", &[0, 1, 3, 2])]);
        let scores = graph.op("MatMul", &[&query, &transposed], &[]);
        let by_head = graph.ints(&[0, heads, -1, 0]);
        let scores = graph.op("Reshape", &[&scores, &by_head], &[]);
        let scores = graph.op("Add", &[&scores, &self.attention_bias], &[]);
        let weights = graph.op("Softmax", &[&scores], &[signed("axis", -1)]);
        let by_kv_head = graph.ints(&[0, kv_heads, -1, 0]);
        let weights = graph.op("Reshape", &[&weights, &by_kv_head], &[]);
        let mixed = graph.op("MatMul", &[&weights, &value], &[]);
        let by_head = graph.ints(&[0, heads, -1, head_dim]);
        let mixed = graph.op("Reshape", &[&mixed, &by_head], &[]);
        let mixed = graph.op("Transpose", &[&mixed], &[ints("perm", &[0, 2, 1, 3])]);
        let width = graph.ints(&[0, 0, heads * head_dim]);
        let mut mixed = graph.op("Reshape", &[&mixed, &width], &[]);
        if spec.family == Family::Bitnet {
            mixed = self.norm(graph, &at("attn_sub_norm"), &mixed)?;
        }
        Ok((self.linear(graph, &at("attn_output"), &mixed)?, [key, value]))
    }

    /// RoPE: rotates the halves `x` and `y` of each head to `x cos - y sin` and `y cos + x sin`.
    fn rotate(&self, graph: &mut GraphBuilder, heads: Value) -> Value {
        let Some([cos, sin]) = &self.rotary else {
            return heads;
        };
        let half = self.spec().head_dim() as i64 / 2;
        let sizes = graph.ints(&[half, half]);
        let halves = graph.node("", "Split", &[&heads, &sizes], &[signed("axis", -1)], 2);
        let mut product = |half: usize, factor| graph.op("Mul", &[&halves[half], factor], &[]);
        let (x_cos, y_sin) = (product(0, cos), product(1, sin));
        let (y_cos, x_sin) = (product(1, cos), product(0, sin));
        let first = graph.op("Sub", &[&x_cos, &y_sin], &[]);
        let second = graph.op("Add", &[&y_cos, &x_sin], &[]);
        graph.op("Concat", &[&first, &second], &[signed("axis", -1)])
    }

    /// Feed-forward network: `down(f(up(x)))` in gpt2, else `down(f(gate(x)) * up(x))`.
    fn feed_forward(
        &self,
        graph: &mut GraphBuilder,
        index: usize,
        input: &Value,
    ) -> Result<Value, FormatError> {
        let at = |part: &str| format!("blk.{index}.{part}");
        let mut hidden = if self.spec().is_gated() {
            let gate = self.linear(graph, &at("ffn_gate"), input)?;
            let gate = activate(graph, self.spec().activation, &gate);
            let up = self.linear(graph, &at("ffn_up"), input)?;
            graph.op("Mul", &[&gate, &up], &[])
        } else {
            let up = self.linear(graph, &at("ffn_up"), input)?;
            activate(graph, self.spec().activation, &up)
        };
        if self.spec().family == Family::Bitnet {
            hidden = self.norm(graph, &at("ffn_sub_norm"), &hidden)?;
        }
        self.linear(graph, &at("ffn_down"), &hidden)
    }
}

fn table(graph: &mut GraphBuilder, table: &Tensor, options: &WriteOptions) -> Result<Table, FormatError> {
    let encoding = options.table(table, &[Encoding::F16, Encoding::Q8_0]);
    let scope = graph.scope.clone();
    Table::new(graph, table, encoding).map_err(|error| error.in_tensor(&scope))
}

fn activate(graph: &mut GraphBuilder, activation: Activation, input: &Value) -> Value {
    match activation {
        Activation::Gelu => graph.op("Gelu", &[input], &[text("approximate", "tanh")]),
        Activation::Swiglu => {
            let gate = graph.op("Sigmoid", &[input], &[]);
            graph.op("Mul", &[input, &gate], &[])
        }
        Activation::SquaredRelu => {
            let positive = graph.op("Relu", &[input], &[]);
            graph.op("Mul", &[&positive, &positive], &[])
        }
    }
}

/// The causal and padding mask as a bias of attention scores: no token attends to later tokens or to padding.
fn attention_bias(graph: &mut GraphBuilder, ids: &Value, mask: &Value) -> Value {
    let (zero, one) = (graph.int(0), graph.int(1));
    let mut length = |of: &Value| {
        let shape = graph.op("Shape", &[of], &[]);
        let axis = graph.int(1);
        graph.op("Gather", &[&shape, &axis], &[int("axis", 0)])
    };
    let (seq, total) = (length(ids), length(mask));
    let past = graph.op("Sub", &[&total, &seq], &[]);
    let keys = graph.op("Range", &[&zero, &total, &one], &[]);
    let queries = graph.op("Range", &[&past, &total, &one], &[]);
    let axis = graph.ints(&[1]);
    let queries = graph.op("Unsqueeze", &[&queries, &axis], &[]);
    let earlier = graph.op("LessOrEqual", &[&keys, &queries], &[]);
    let axes = graph.ints(&[1, 2]);
    let token = graph.op("Cast", &[mask], &[int("to", Element::Bool as usize)]);
    let token = graph.op("Unsqueeze", &[&token, &axes], &[]);
    let visible = graph.op("And", &[&earlier, &token], &[]);
    // Finite, because the softmax of a padding token, which attends to nothing, must not be NaN.
    let (nothing, hidden) = (graph.float(0.0), graph.float(f32::MIN));
    graph.op("Where", &[&visible, &nothing, &hidden], &[])
}

/// Cosine and sine of `position / theta^(2 i / head_dim)`.
fn rotary_cos_sin(
    graph: &mut GraphBuilder,
    spec: &ModelSpec,
    positions: &Value,
) -> Result<[Value; 2], FormatError> {
    let head_dim = spec.head_dim();
    let theta = f64::from(spec.rope_theta);
    let frequency = |i: usize| theta.powf(-2.0 * i as f64 / head_dim as f64) as f32;
    let frequencies: Vec<f32> = (0..head_dim / 2).map(frequency).collect();
    let frequencies = floats(graph, "rotary.frequencies", &[head_dim / 2], frequencies)?;
    let positions = graph.op("Cast", &[positions], &[int("to", Element::Float as usize)]);
    let axes = graph.ints(&[1, 3]);
    let positions = graph.op("Unsqueeze", &[&positions, &axes], &[]);
    let angles = graph.op("Mul", &[&positions, &frequencies], &[]);
    Ok(["Cos", "Sin"].map(|function| graph.op(function, &[&angles], &[])))
}

/// All values of a small tensor.
fn values(tensor: &Tensor) -> Vec<f32> {
    let mut values = vec![0.0; tensor.rows() * tensor.cols()];
    let rows = values.chunks_mut(tensor.cols()).enumerate();
    rows.for_each(|(row, values)| tensor.read_row(row, values));
    values
}
