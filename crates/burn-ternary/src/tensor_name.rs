//! Names of parameters in model files.

/// Parts of parameter paths, and their names in model files.
const NAMES: [(&str, &str); 18] = [
    ("embedding", "token_embd.weight"),
    ("positions", "position_embd.weight"),
    ("head", "output.weight"),
    ("transformer.blocks.", "blk."),
    ("transformer.norm.", "output_norm."),
    ("attention_norm.", "attn_norm."),
    ("attention.query.", "attn_q."),
    ("attention.key.", "attn_k."),
    ("attention.value.", "attn_v."),
    ("attention.sub_norm.", "attn_sub_norm."),
    ("attention.output.", "attn_output."),
    ("feed_forward_norm.", "ffn_norm."),
    ("feed_forward.gate.", "ffn_gate."),
    ("feed_forward.up.", "ffn_up."),
    ("feed_forward.sub_norm.", "ffn_sub_norm."),
    ("feed_forward.down.", "ffn_down."),
    // The variants of a norm.
    ("Layer.", ""),
    ("Rms.", ""),
];

/// The name in model files of the parameter at `path`, as in `blk.0.attn_q.weight`.
pub(crate) fn tensor_name(path: &str) -> String {
    NAMES.iter().fold(path.into(), |name: String, (ours, theirs)| name.replace(ours, theirs))
}
