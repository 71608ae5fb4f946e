//! Serves a model file, or a random model that speaks nonsense: `serve [ADDRESS] [MODEL] [KEY]`.

use std::{env, error::Error, sync::Arc};
use ternary_format::{Activation, Encoding, Family, ModelSpec, Tokenizer};
use ternary_infer::{Engine, EngineOptions, random};
use ternary_serve::{Models, ServeOptions, bind, serve};

/// Speaks bytes.
fn nonsense() -> Result<Engine, Box<dyn Error>> {
    let spec = ModelSpec {
        family: Family::Llama,
        vocab_size: 259,
        context: 2048,
        d_model: 256,
        n_layers: 4,
        n_heads: 4,
        n_kv_heads: 4,
        d_ff: 512,
        activation: Activation::Swiglu,
        tied: true,
        norm_eps: 1e-5,
        rope_theta: 1e4,
    };
    let mut model = random::model(&spec, |group| Encoding::Ternary { group }, Encoding::Q8_0, 1)?;
    model.tokenizer = Some(Tokenizer::byte());
    Ok(Engine::from_model(model, EngineOptions::default())?)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let mut options = ServeOptions::default();
    if let Some(address) = arguments.next() {
        options.address = address.parse()?;
    }
    let engine = match arguments.next().filter(|path| path != "random") {
        Some(path) => Engine::load(path, EngineOptions::default())?,
        None => nonsense()?,
    };
    options.api_key = arguments.next();
    let models = Models::new([("duck".to_string(), Arc::new(engine))])?;
    let listener = bind(&options).await?;
    println!("http://{}", listener.local_addr()?);
    serve(listener, models, options, async { tokio::signal::ctrl_c().await.unwrap_or_default() }).await?;
    Ok(())
}
