//! One module per promise.

mod agreement;
mod parity;

/// Largest difference, divided by the spread of the reference.
fn error(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let spread =
        expected.iter().copied().fold(f64::MIN, f64::max) - expected.iter().copied().fold(f64::MAX, f64::min);
    let difference = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).abs());
    difference.fold(0.0, |worst, d| if d > worst || d.is_nan() { d } else { worst }) / spread
}

/// Mean of `KL(softmax(expected) || softmax(found))` over positions in nats, and the share of equal likeliest tokens.
fn divergence(found: &[f32], expected: &[f64], vocab: usize) -> (f64, f64) {
    let rows = found.chunks(vocab).zip(expected.chunks(vocab));
    let count = rows.len() as f64;
    let (mut divergence, mut equal) = (0.0, 0.0);
    for (found, expected) in rows {
        let found: Vec<f64> = found.iter().copied().map(f64::from).collect();
        let (found, expected) = (log_softmax(&found), log_softmax(expected));
        divergence += found.iter().zip(&expected).map(|(q, p)| p.exp() * (p - q)).sum::<f64>();
        equal += f64::from(likeliest(&found) == likeliest(&expected));
    }
    (divergence / count, equal / count)
}

fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::MIN, f64::max);
    let total: f64 = logits.iter().map(|x| (x - max).exp()).sum();
    logits.iter().map(|x| x - max - total.ln()).collect()
}

fn likeliest(logits: &[f64]) -> usize {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap()
}
