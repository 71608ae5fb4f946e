//! A server on loopback with small random models, and a client that sends arbitrary bytes.

use serde_json::{Value, json};
use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{Arc, OnceLock},
    thread::JoinHandle,
    time::Duration,
};
use ternary_format::{
    Activation, Encoding, Family, ModelSpec, PackedModel, Tensor, Tokenizer, chat::TEMPLATE,
};
use ternary_infer::{Engine, EngineOptions, GenerateOptions, Sampling, random};
use ternary_serve::{Models, ServeError, ServeOptions, bind, serve};
use tokio::sync::oneshot;

fn spec(family: Family, context: usize) -> ModelSpec {
    let gpt2 = family == Family::Gpt2;
    ModelSpec::new(family)
        .with_vocab_size(259)
        .with_context(context)
        .with_d_model(64)
        .with_n_layers(2)
        .with_n_heads(4)
        .with_n_kv_heads(if gpt2 { 4 } else { 2 })
        .with_d_ff(128)
        .with_activation(if gpt2 { Activation::Gelu } else { Activation::Swiglu })
        .with_tied(true)
        .with_norm_eps(1e-5)
        .with_rope_theta(1e4)
}

/// A random model with a byte tokenizer.
fn model(spec: &ModelSpec, seed: u64) -> PackedModel {
    let mut model = random::model(spec, |group| Encoding::Ternary { group }, Encoding::F32, seed).unwrap();
    // The likeliest token is a byte, never an end: its logit is above zero, and those of the special tokens are zero.
    let table = &model.tensors["token_embd.weight"];
    let mut values = vec![0.0; spec.vocab_size * spec.d_model];
    values.chunks_exact_mut(spec.d_model).take(256).enumerate().for_each(|(i, row)| table.read_row(i, row));
    let table = Tensor::f32(&[spec.vocab_size, spec.d_model], &values).unwrap();
    model.tensors.insert("token_embd.weight".into(), table);
    model.tokenizer = Some(Tokenizer::byte());
    model.chat_template = Some(TEMPLATE.into());
    model
}

fn loaded(model: PackedModel) -> Arc<Engine> {
    let context = model.spec.context;
    let options = EngineOptions::default().with_threads(1).with_context(context);
    Arc::new(Engine::from_model(model, options).unwrap())
}

/// The same model, trained on plain text.
pub fn text_engine() -> Arc<Engine> {
    loaded(model(&spec(Family::Llama, 512), 1).with_chat_template(None))
}

pub fn engine_of(context: usize, seed: u64) -> Arc<Engine> {
    loaded(model(&spec(Family::Llama, context), seed))
}

/// A model with finite weights, of which one logit at the given position is not finite.
pub fn overflowing_engine(position: usize) -> Arc<Engine> {
    let spec = spec(Family::Gpt2, 64).with_tied(false);
    let mut model = model(&spec, 1);
    let mut replace = |name: &str, rows: usize, row: usize, first: f32| {
        let mut values = vec![0.0; rows * spec.d_model];
        let table = &model.tensors[name];
        values.chunks_exact_mut(spec.d_model).enumerate().for_each(|(i, row)| table.read_row(i, row));
        values[row * spec.d_model] = first;
        let table = Tensor::f32(&[rows, spec.d_model], &values).unwrap();
        model.tensors.insert(name.into(), table);
    };
    // A layer norm makes 8 of a feature that exceeds all 64 by far, and seldom more than 3 of another.
    replace("position_embd.weight", spec.context, position, 1e6);
    replace("output.weight", spec.vocab_size, 0, 1e38);
    loaded(model)
}

pub fn engine() -> Arc<Engine> {
    static ENGINE: OnceLock<Arc<Engine>> = OnceLock::new();
    ENGINE.get_or_init(|| engine_of(512, 1)).clone()
}

/// An engine with a context of 32,768 tokens, so that a greedy completion runs until it is stopped.
pub fn endless_engine() -> Arc<Engine> {
    static ENGINE: OnceLock<Arc<Engine>> = OnceLock::new();
    ENGINE.get_or_init(|| engine_of(1 << 15, 1)).clone()
}

/// A request whose completion does not end by itself.
pub fn endless() -> Value {
    json!({ "model": "duck", "prompt": "quack", "temperature": 0, "max_tokens": 30_000 })
}

/// The text that an engine generates for one request alone.
pub fn alone(
    engine: &Engine,
    prompt: &[u32],
    sampling: Sampling,
    max_tokens: usize,
) -> (String, usize, &'static str) {
    let tokenizer = engine.tokenizer().unwrap();
    let stop = tokenizer.specials().map(|special| special.1).collect();
    let options =
        GenerateOptions::default().with_sampling(sampling).with_max_tokens(max_tokens).with_stop(stop);
    let mut generation = engine.generate(prompt, options).unwrap();
    let mut decoder = tokenizer.decoder();
    let (mut text, mut tokens) = (String::new(), 0);
    for id in generation.by_ref() {
        text.push_str(&decoder.push(id));
        tokens += 1;
    }
    text.push_str(&decoder.finish());
    let stopped = matches!(generation.finish_reason(), Some(ternary_infer::FinishReason::Stop(_)));
    (text, tokens, if stopped { "stop" } else { "length" })
}

/// A server. Dropping it stops it and checks that it ended without an error.
pub struct Site {
    pub address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl Site {
    /// A server of the model `duck`, with changed options.
    pub fn new(change: impl FnOnce(&mut ServeOptions)) -> Self {
        Self::of([("duck".to_string(), engine())], change)
    }

    pub fn endless(change: impl FnOnce(&mut ServeOptions)) -> Self {
        Self::of([("duck".to_string(), endless_engine())], change)
    }

    pub fn of(
        engines: impl IntoIterator<Item = (String, Arc<Engine>)>,
        change: impl FnOnce(&mut ServeOptions),
    ) -> Self {
        let mut options = ServeOptions::default();
        options.address.set_port(0);
        change(&mut options);
        let models = Models::new(engines).unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let listener = runtime.block_on(bind(&options)).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async { stopped.await.unwrap_or_default() };
        let thread = std::thread::spawn(move || runtime.block_on(serve(listener, models, options, shutdown)));
        Self { address, stop: Some(stop), thread: Some(thread) }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// The response to arbitrary bytes.
    pub fn send(&self, bytes: &[u8]) -> Response {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        Response::read(stream)
    }

    /// The bytes of a request.
    pub fn request(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
            self.address,
            body.len()
        );
        [head.as_bytes(), body].concat()
    }

    pub fn get(&self, path: &str) -> Response {
        self.send(&self.request("GET", path, "", b""))
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        self.post_bytes(path, body.to_string().as_bytes())
    }

    pub fn post_bytes(&self, path: &str, body: &[u8]) -> Response {
        self.send(&self.request("POST", path, "Content-Type: application/json\r\n", body))
    }

    /// The value of a metric without or with other labels than the model.
    pub fn metric(&self, name: &str) -> f64 {
        let page = self.get("/metrics").text();
        let line = page.lines().find(|line| line.starts_with(&format!("{name}{{")));
        line.unwrap_or_else(|| panic!("no {name} in\n{page}")).rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Waits until a metric is what it should be.
    pub fn await_metric(&self, name: &str, holds: impl Fn(f64) -> bool) {
        for _ in 0..3000 {
            if holds(self.metric(name)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("{name} is still {}", self.metric(name));
    }

    /// Asks the server to stop.
    pub fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    pub fn join(&mut self) {
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let served = thread.join();
            if !std::thread::panicking() {
                served.unwrap().unwrap();
            }
        }
    }
}

#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    /// Reads to the end of the connection.
    pub fn read(mut stream: TcpStream) -> Self {
        let mut bytes = Vec::new();
        // A server that refuses a body may reset the connection behind its answer.
        if let Err(error) = stream.read_to_end(&mut bytes) {
            assert!(!bytes.is_empty(), "no response: {error}");
        }
        stream.shutdown(Shutdown::Both).ok();
        Self::parse(&bytes)
    }

    pub fn parse(bytes: &[u8]) -> Self {
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").expect("headers");
        let head = std::str::from_utf8(&bytes[..end]).unwrap();
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers = lines.map(|line| line.split_once(": ").unwrap());
        let headers: Vec<(String, String)> =
            headers.map(|(name, value)| (name.to_lowercase(), value.to_string())).collect();
        let mut body = bytes[end + 4..].to_vec();
        if headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked") {
            body = unchunked(&body);
        }
        Self { status, headers, body }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|header| header.0 == name).map(|header| header.1.as_str())
    }

    /// UTF-8, or the test fails.
    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The JSON of server-sent events, which must end with `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text());
        assert_eq!(self.header("content-type"), Some("text/event-stream"));
        let text = self.text();
        let mut data: Vec<&str> =
            text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{text}");
        data.into_iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    /// Asserts an error in OpenAI's form, and gives its code and the field that it names.
    #[track_caller]
    pub fn refused(&self, status: u16) -> (String, String) {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        let error = &self.json()["error"];
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{error}");
        assert!(error["type"].as_str().is_some_and(|kind| kind.ends_with("_error")), "{error}");
        let text =
            |key: &str| error.get(key).expect("all four keys").as_str().unwrap_or_default().to_string();
        (text("code"), text("param"))
    }
}

/// The data of the chunks that were received.
fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = bytes.windows(2).position(|window| window == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).unwrap(), 16).unwrap();
        let Some(chunk) = bytes.get(end + 2..end + 2 + size) else { break };
        body.extend_from_slice(chunk);
        bytes = bytes.get(end + 2 + size + 2..).unwrap_or_default();
    }
    body
}
