//! AdamW and Muon in float64, as their authors define them.

/// AdamW as in its paper, in float64.
pub(super) struct ReferenceAdamW {
    pub(super) weights: Vec<f64>,
    first: Vec<f64>,
    second: Vec<f64>,
    time: i32,
}

impl ReferenceAdamW {
    pub(super) fn new(weights: &[f32]) -> Self {
        let zeros = vec![0.0; weights.len()];
        let weights = weights.iter().map(|&w| w.into()).collect();
        Self { weights, first: zeros.clone(), second: zeros, time: 0 }
    }

    pub(super) fn step(&mut self, grads: &[f32], lr: f64, weight_decay: f64) {
        let (beta1, beta2): (f64, f64) = (0.9, 0.95);
        self.time += 1;
        for (i, &grad) in grads.iter().enumerate() {
            let grad = f64::from(grad);
            self.first[i] = beta1 * self.first[i] + (1.0 - beta1) * grad;
            self.second[i] = beta2 * self.second[i] + (1.0 - beta2) * grad * grad;
            let first = self.first[i] / (1.0 - beta1.powi(self.time));
            let second = self.second[i] / (1.0 - beta2.powi(self.time));
            let decay = lr * weight_decay * self.weights[i];
            self.weights[i] -= decay + lr * first / (second.sqrt() + 1e-8);
        }
    }
}

/// Row-major float64 matrix.
#[derive(Clone)]
pub(super) struct Matrix {
    rows: usize,
    cols: usize,
    pub(super) values: Vec<f64>,
}

impl Matrix {
    fn from_fn(rows: usize, cols: usize, f: impl Fn(usize, usize) -> f64) -> Self {
        let values = (0..rows * cols).map(|i| f(i / cols, i % cols)).collect();
        Self { rows, cols, values }
    }

    pub(super) fn new(rows: usize, cols: usize, values: &[f32]) -> Self {
        Self::from_fn(rows, cols, |i, j| values[i * cols + j].into())
    }

    fn at(&self, i: usize, j: usize) -> f64 {
        self.values[i * self.cols + j]
    }

    pub(super) fn transposed(&self) -> Self {
        Self::from_fn(self.cols, self.rows, |i, j| self.at(j, i))
    }

    fn times(&self, other: &Self) -> Self {
        Self::from_fn(self.rows, other.cols, |i, j| {
            (0..self.cols).map(|k| self.at(i, k) * other.at(k, j)).sum()
        })
    }

    /// `a * self + b * other`.
    fn mixed(&self, a: f64, other: &Self, b: f64) -> Self {
        Self::from_fn(self.rows, self.cols, |i, j| a * self.at(i, j) + b * other.at(i, j))
    }
}

/// Keller Jordan's Muon on `weight: [d_out, d_in]`, in float64, as in `muon.py`.
pub(super) struct ReferenceMuon {
    pub(super) weight: Matrix,
    momentum: Matrix,
}

impl ReferenceMuon {
    pub(super) fn new(weight: Matrix) -> Self {
        let momentum = weight.mixed(0.0, &weight, 0.0);
        Self { weight, momentum }
    }

    pub(super) fn step(&mut self, grad: &Matrix, lr: f64, weight_decay: f64) {
        self.momentum = self.momentum.mixed(0.95, grad, 0.05);
        let mut x = grad.mixed(0.05, &self.momentum, 0.95);
        let tall = x.rows > x.cols;
        if tall {
            x = x.transposed();
        }
        let norm = x.values.iter().map(|v| v * v).sum::<f64>().sqrt();
        x = x.mixed(1.0 / (norm + 1e-7), &x, 0.0);
        for _ in 0..5 {
            let a = x.times(&x.transposed());
            let b = a.mixed(-4.7750, &a.times(&a), 2.0315);
            x = x.mixed(3.4445, &b.times(&x), 1.0);
        }
        if tall {
            x = x.transposed();
        }
        let aspect = (x.rows as f64 / x.cols as f64).max(1.0).sqrt();
        self.weight = self.weight.mixed(1.0 - lr * weight_decay, &x, -lr * aspect);
    }
}
