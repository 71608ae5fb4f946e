use burn::{data::dataloader::DataLoader, module::Module};
use burn_ternary::data::{Dataset, LmLoader};
use burn_ternary::format::{WriteOptions, write_model};
use burn_ternary::infer::{Engine, EngineOptions, GenerateOptions};
use burn_ternary::run::Experiment;
use burn_ternary::train::QuantizationTrainer;
use burn_ternary::{device::device, export_for_inference};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The embedded experiment: a Duck of a million parameters, and the texts that come with the crate.
    let Experiment { data, mut model, quant, optim, schedule, .. } = Experiment::embedded();
    let data = Dataset::prepare(&data, model.context, 1, "cache".as_ref())?;
    model.vocab_size = data.tokenizer.vocab_size();

    // Train. `quant.float()` gives the float twin.
    let (steps, device) = (100, device("flex")?.autodiff()); // the CPU; "auto" prefers a GPU that is compiled in
    let mut trainer = QuantizationTrainer::new(model.init(&quant, 1, &device), &optim, &schedule, steps, 1);
    for batch in LmLoader::training(data.train, 8, 1, steps, &device).iter() {
        let report = trainer.train_step(vec![batch?]);
        println!("{:4} {:.3} nats per token", report.step, report.loss);
    }

    // Save the latent weights, to train on from them with `load_file`.
    trainer.model().clone().save_file("duck.bpk")?;

    // Export codes and scales, exactly those of the forward pass, to a file that llama.cpp reads too.
    let packed = export_for_inference(trainer.model(), Some(&data.tokenizer), "duck")?;
    write_model(&packed, "duck.gguf".as_ref(), &WriteOptions::default())?;

    // Generate, without Burn.
    let engine = Engine::load("duck.gguf", EngineOptions::default())?;
    let prompt = data.tokenizer.encode("One day")?;
    let options = GenerateOptions::default().with_max_tokens(60);
    let ids: Vec<u32> = engine.generate(&prompt, options)?.collect();
    println!("One day{}", data.tokenizer.decode(&ids));
    Ok(())
}
