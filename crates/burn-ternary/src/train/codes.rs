//! What the ternary codes of a model do over a run.

use crate::nn::DuckQuantized;

/// Codes and scales of a model, compared with those seen before.
pub struct CodeStats {
    /// Share of zero codes over all linear layers.
    pub zero_fraction: f64,
    /// Share of codes that changed since the last look; none at the first.
    pub flipped: Option<f64>,
    /// `mean |ln(scale / scale at the start)|` over all scales.
    pub scale_drift: f64,
    /// Counts of -1, 0, +1 by layer.
    pub counts: Vec<(String, [u64; 3])>,
}

/// Remembers the scales of the start and the codes of the last look.
pub struct CodeTracker {
    initial_scales: Vec<f32>,
    last_codes: Option<Vec<i8>>,
}

impl CodeTracker {
    /// Starts from an untrained model; none for a float twin.
    pub fn new(initial: &DuckQuantized) -> Option<Self> {
        let initial_scales = scales(initial);
        (!initial_scales.is_empty()).then_some(Self { initial_scales, last_codes: None })
    }

    /// Looks at a model of the same shape.
    pub fn look(&mut self, model: &DuckQuantized) -> CodeStats {
        let mut codes = Vec::new();
        let mut counts = Vec::new();
        for (name, linear) in model.linears() {
            let Some(layer) = linear.codes() else { continue };
            let mut count = [0; 3];
            for code in layer.into_data().iter::<f32>() {
                let code = code as i8;
                count[(code + 1) as usize] += 1;
                codes.push(code);
            }
            counts.push((name, count));
        }
        let zeros: u64 = counts.iter().map(|(_, count)| count[1]).sum();
        let flipped = self.last_codes.as_ref().map(|last| {
            let changed = last.iter().zip(&codes).filter(|(last, now)| last != now).count();
            changed as f64 / codes.len() as f64
        });
        let drift: f64 = scales(model)
            .iter()
            .zip(&self.initial_scales)
            .map(|(now, start)| f64::from(now / start).ln().abs())
            .sum();
        let stats = CodeStats {
            zero_fraction: zeros as f64 / codes.len() as f64,
            flipped,
            scale_drift: drift / self.initial_scales.len() as f64,
            counts,
        };
        self.last_codes = Some(codes);
        stats
    }
}

fn scales(model: &DuckQuantized) -> Vec<f32> {
    let mut scales = Vec::new();
    for (_, linear) in model.linears() {
        if let Some(quantizer) = &linear.quantizer {
            scales.extend(quantizer.scales(linear.weight.val()).into_data().iter::<f32>());
        }
    }
    scales
}
