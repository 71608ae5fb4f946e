//! Makes your own Burn model ternary: one classifier of two spirals, trained as it is and after `prepare`, then kept in a
//! file with two bits per ternary weight.

use burn::nn::{Linear, LinearConfig, loss::CrossEntropyLossConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::{prelude::*, tensor::activation::relu};
use burn_ternary::prepared;
use burn_ternary::quant::{QuantConfig, prepare};

#[derive(Module, Debug)]
struct Classifier {
    input: Linear,
    hidden: Linear,
    output: Linear,
}

impl Classifier {
    fn forward(&self, points: Tensor<2>) -> Tensor<2> {
        self.output.forward(relu(self.hidden.forward(relu(self.input.forward(points)))))
    }
}

/// Points on two spirals that wind into each other, and the spiral of each.
fn spirals(count: usize, device: &Device) -> (Tensor<2>, Tensor<1, Int>) {
    let radius =
        |i: usize| (i / 2) as f32 / (count / 2) as f32 * if i.is_multiple_of(2) { 1.0 } else { -1.0 };
    let point = |r: f32| [r * (9.0 * r.abs()).cos(), r * (9.0 * r.abs()).sin()];
    let points: Vec<f32> = (0..count).flat_map(|i| point(radius(i))).collect();
    let sides = Tensor::arange(0..count as i64, device).remainder_scalar(2);
    (Tensor::from_data(TensorData::new(points, [count, 2]), device), sides)
}

/// Trains with Burn's own AdamW.
fn train(mut model: Classifier, device: &Device) -> Classifier {
    let (points, sides) = spirals(512, device);
    let (mut optimizer, loss) = (AdamWConfig::new().init(), CrossEntropyLossConfig::new().init(device));
    for step in 0..1000 {
        let gradients = loss.forward(model.forward(points.clone()), sides.clone()).backward();
        let gradients = GradientsParams::from_grads(gradients, &model);
        model = optimizer.step(3e-3 * (1.0 - step as f64 / 1000.0), model, gradients);
    }
    model
}

/// Prints accuracy on other points, zero fraction and size.
fn report(name: &str, model: &Classifier, bytes: usize, device: &Device) {
    let (points, sides) = spirals(1186, device);
    let right = model.forward(points).argmax(1).squeeze_dim(1).equal(sides).float().mean();
    let zeros = model.hidden.weight.val().equal_scalar(0.0).float().mean();
    let [right, zeros] = [right, zeros].map(|share| share.into_scalar::<f32>());
    let ratio = 4.0 * model.num_params() as f64 / bytes as f64;
    println!("{name:>7}: accuracy {right:.3}, zero fraction {zeros:.2}, {bytes} bytes: 1/{ratio:.1} of f32");
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = burn_ternary::device::device("flex")?.autodiff();
    device.seed(0);
    let linear = |inputs, outputs| LinearConfig::new(inputs, outputs).init(&device);
    let plain = Classifier { input: linear(2, 128), hidden: linear(128, 128), output: linear(128, 2) };
    let chosen = |path: &str| path == "hidden.weight";
    let (ternary, what) = prepare(plain.clone(), &QuantConfig::default(), chosen)?;
    println!("{what}");
    let float = train(plain.clone(), &device);
    report("float", &float, 4 * float.num_params(), &device);

    let ternary = train(ternary, &device);
    let file = std::env::temp_dir().join(format!("spirals-{}.safetensors", std::process::id()));
    prepared::save(&ternary, &file)?;
    let bytes = std::fs::metadata(&file)?.len() as usize;
    report("ternary", &ternary, bytes, &device);
    // The plain model takes the ternary values from the file.
    let loaded = prepared::load(plain, &file)?;
    std::fs::remove_file(&file)?;
    report("loaded", &loaded, bytes, &device);
    Ok(())
}
