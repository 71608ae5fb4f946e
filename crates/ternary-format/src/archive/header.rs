//! The header of an archive: everything but the tensors.

use super::{
    MAGIC, VERSION, check_expansion,
    coder::{Decoder, Encoder, can_encode},
    compact_tokenizer,
    io::{Sink, Source},
    text,
};
use crate::{Activation, Ends, Family, FormatError, ModelSpec, PackedModel, Tokenizer};
use std::{
    io::{Read, Write},
    path::Path,
};

/// Bytes by which a header may exceed the usual expansion.
const EXPANSION_ALLOWANCE: usize = 64 << 10;

/// Maximum length of a header, packed or unpacked.
const LENGTH_LIMIT: usize = 1 << 28;

const FAMILIES: [Family; 3] = [Family::Gpt2, Family::Llama, Family::Bitnet];
const ACTIVATIONS: [Activation; 3] = [Activation::Gelu, Activation::Swiglu, Activation::SquaredRelu];

// Bits of the flags.
const TIED: u8 = 1;
const TEMPLATE: u8 = 2;
const TOKENIZER: u8 = 4;
const COMPACT: u8 = 8;
const BOS: u8 = 16;
const EOS: u8 = 32;
const ADD_BOS: u8 = 64;

/// Writes the magic bytes, the version and the header.
pub(super) fn write(model: &PackedModel, sink: &mut Sink<impl Write>) -> Result<(), FormatError> {
    sink.bytes(&MAGIC)?;
    sink.bytes(&[VERSION])?;
    let mut header = Vec::new();
    write_fields(model, &mut Sink::new(&mut header, Path::new("")))?;
    let mut encoder = Encoder::default();
    text::code(&mut encoder, &mut header);
    let packed = encoder.finish();
    sink.varint(header.len())?;
    sink.varint(packed.len())?;
    sink.bytes(&packed)?;
    sink.checksum()
}

fn write_fields(model: &PackedModel, sink: &mut Sink<impl Write>) -> Result<(), FormatError> {
    let PackedModel { name, spec, tokenizer, chat_template, .. } = model;
    let ends = tokenizer.as_ref().map(Tokenizer::ends).unwrap_or_default();
    let json = tokenizer.as_ref().map(Tokenizer::to_json);
    let compact = json.as_deref().and_then(compact);
    let flag = |is_set, flag| if is_set { flag } else { 0 };
    let index = |index: Option<usize>| index.unwrap_or_default() as u8;
    sink.bytes(&[
        index(FAMILIES.iter().position(|&family| family == spec.family)),
        index(ACTIVATIONS.iter().position(|&activation| activation == spec.activation)),
        flag(spec.tied, TIED)
            | flag(chat_template.is_some(), TEMPLATE)
            | flag(json.is_some(), TOKENIZER)
            | flag(compact.is_some(), COMPACT)
            | flag(ends.bos.is_some(), BOS)
            | flag(ends.eos.is_some(), EOS)
            | flag(ends.add_bos, ADD_BOS),
    ])?;
    let ModelSpec { vocab_size, context, d_model, n_layers, n_heads, n_kv_heads, d_ff, .. } = *spec;
    for size in [vocab_size, context, d_model, n_layers, n_heads, n_kv_heads, d_ff] {
        sink.varint(size)?;
    }
    sink.bytes(&spec.norm_eps.to_le_bytes())?;
    sink.bytes(&spec.rope_theta.to_le_bytes())?;
    [ends.bos, ends.eos].into_iter().flatten().try_for_each(|id| sink.varint(id as usize))?;
    sink.text(name)?;
    [chat_template, &compact.or(json)].into_iter().flatten().try_for_each(|text| sink.text(text))
}

/// The compact form of a tokenizer, if it restores exactly the same JSON.
fn compact(json: &str) -> Option<String> {
    let short = compact_tokenizer::compact(json)?;
    let again = Tokenizer::from_json(compact_tokenizer::expand(&short)?.as_bytes()).ok()?;
    (again.to_json() == json).then_some(short)
}

/// Reads the header. The model has no tensors yet.
///
/// # Errors
/// `Io`, `Truncated`, and those of a malformed header.
pub(super) fn read(source: &mut Source<impl Read>) -> Result<PackedModel, FormatError> {
    let found = source.word("the magic bytes")?;
    if found != MAGIC {
        return Err(FormatError::ArchiveMagic { found });
    }
    let found = source.byte("the version")?;
    if found != VERSION {
        return Err(FormatError::ArchiveVersion { found, expected: VERSION });
    }
    let [length, packed] =
        [source.varint("the length of the header")?, source.varint("the packed length of the header")?];
    let damaged = |why| FormatError::Damaged { part: "header".into(), why };
    if length > LENGTH_LIMIT || packed > LENGTH_LIMIT || !can_encode(packed, text::DECISIONS * length) {
        return Err(damaged("its length is impossible"));
    }
    check_expansion(packed, length, EXPANSION_ALLOWANCE)?;
    let packed = source.bytes(packed, "the header")?;
    source.checksum(|| "header".into())?;
    let mut header = vec![0; length];
    let mut decoder = Decoder::new(&packed).ok_or_else(|| damaged("not a valid stream"))?;
    text::code(&mut decoder, &mut header);
    if !decoder.finished() {
        return Err(damaged("not a valid stream"));
    }
    let mut fields = Source::new(header.as_slice(), Path::new(""));
    let model = read_fields(&mut fields)?;
    if fields.is_at_end()? { Ok(model) } else { Err(damaged("bytes after its last field")) }
}

fn read_fields(source: &mut Source<impl Read>) -> Result<PackedModel, FormatError> {
    let unknown = |key: &str, found: u8, expected: &str| FormatError::Value {
        key: key.into(),
        found: found.to_string(),
        expected: expected.into(),
    };
    let [family, activation, flags] =
        [source.byte("the family")?, source.byte("the activation")?, source.byte("the flags")?];
    let has = |flag| flags & flag != 0;
    if flags > 127 {
        return Err(unknown("flags", flags, "at most 127"));
    }
    let family = *FAMILIES.get(usize::from(family)).ok_or_else(|| unknown("family", family, "at most 2"))?;
    let activation = *ACTIVATIONS
        .get(usize::from(activation))
        .ok_or_else(|| unknown("activation", activation, "at most 2"))?;
    let mut sizes = [0; 7];
    for size in &mut sizes {
        *size = source.varint("a size")?;
    }
    let [vocab_size, context, d_model, n_layers, n_heads, n_kv_heads, d_ff] = sizes;
    let spec = ModelSpec {
        family,
        vocab_size,
        context,
        d_model,
        n_layers,
        n_heads,
        n_kv_heads,
        d_ff,
        activation,
        tied: has(TIED),
        norm_eps: f32::from_le_bytes(source.word("the norm's epsilon")?),
        rope_theta: f32::from_le_bytes(source.word("the base of the rotary frequencies")?),
    };
    spec.validate()?;
    let mut id = |flag| {
        let id = has(flag).then(|| source.varint("a token id")).transpose()?;
        Ok::<_, FormatError>(id.map(|id| u32::try_from(id).unwrap_or(u32::MAX)))
    };
    let ends = Ends { bos: id(BOS)?, eos: id(EOS)?, add_bos: has(ADD_BOS) };
    let name = source.text("the name")?;
    let chat_template = has(TEMPLATE).then(|| source.text("the chat template")).transpose()?;
    let tokenizer = has(TOKENIZER).then(|| {
        let why = || FormatError::Tokenizer { why: "malformed compact tokenizer in the archive".into() };
        let json = source.text("the tokenizer")?;
        let json = if has(COMPACT) { compact_tokenizer::expand(&json).ok_or_else(why)? } else { json };
        Ok::<_, FormatError>(Tokenizer::from_json(json.as_bytes())?.with_ends(ends))
    });
    let tokenizer = tokenizer.transpose()?;
    if let Some(tokens) = tokenizer.as_ref().map(Tokenizer::vocab_size)
        && tokens > spec.vocab_size
    {
        return Err(FormatError::Vocabulary { tokens, rows: spec.vocab_size });
    }
    Ok(PackedModel {
        name,
        spec,
        tensors: Default::default(),
        tokenizer,
        chat_template,
        adapter: None,
        warnings: Vec::new(),
    })
}
