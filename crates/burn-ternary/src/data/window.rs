//! Windows of a token file. Their order is a pure function of (seed, index).

use super::{DataError, tokens::TokenFile};
use crate::seed;
use std::sync::Arc;

/// A run of tokens: inputs `ids[..seq_len]`, targets `ids[1..]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Index of its first token in the corpus.
    pub start: usize,
    /// `seq_len + 1` token ids.
    pub ids: Vec<u32>,
    /// Whether the target `ids[i + 1]` counts in the loss; `seq_len` entries.
    pub mask: Vec<bool>,
}

/// The windows of a corpus by index, computed on demand.
///
/// In training order, an epoch visits consecutive windows from a random offset, in random order. Every epoch has its own
/// offset, so that windows are cut elsewhere, and its own permutation.
#[derive(Clone, Debug)]
pub struct TokenWindows {
    tokens: Arc<TokenFile>,
    seq_len: usize,
    per_epoch: usize,
    order: Order,
}

#[derive(Clone, Copy, Debug)]
enum Order {
    Shuffled { seed: u64 },
    Sequential,
}

/// Training windows of `seq_len` inputs per epoch of a text of `tokens`.
pub(super) fn training_windows(tokens: usize, seq_len: usize) -> usize {
    // One window fewer than would fit, if there are several: the offset varies within the space that this leaves.
    (tokens / seq_len).saturating_sub(1).max(1)
}

impl TokenWindows {
    /// An endless sequence of windows of `seq_len` inputs, in training order.
    ///
    /// # Errors
    /// `TooShort`: the corpus has fewer than `seq_len + 1` tokens.
    pub fn new(tokens: Arc<TokenFile>, seq_len: usize, seed: u64) -> Result<Self, DataError> {
        let whole = Self::sequential(tokens, seq_len)?;
        let per_epoch = training_windows(whole.tokens.len(), seq_len);
        Ok(Self { per_epoch, order: Order::Shuffled { seed }, ..whole })
    }

    /// Consecutive windows from the first token on, in the order of the text; for evaluation.
    ///
    /// # Errors
    /// `TooShort`: the corpus has fewer than `seq_len + 1` tokens.
    pub fn sequential(tokens: Arc<TokenFile>, seq_len: usize) -> Result<Self, DataError> {
        assert!(seq_len > 0, "a window has at least one token");
        if tokens.len() <= seq_len {
            let split = tokens.split().into();
            return Err(DataError::TooShort { split, tokens: tokens.len(), needed: seq_len + 1 });
        }
        let per_epoch = (tokens.len() - 1) / seq_len;
        Ok(Self { tokens, seq_len, per_epoch, order: Order::Sequential })
    }

    /// Inputs per window.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Windows per epoch.
    pub fn per_epoch(&self) -> usize {
        self.per_epoch
    }

    /// The tokens from which windows are cut.
    pub fn tokens(&self) -> &Arc<TokenFile> {
        &self.tokens
    }

    /// Window `index`. Index `e * per_epoch + i` is window `i` of epoch `e`; without end.
    pub fn get(&self, index: usize) -> Window {
        self.at(self.start(index))
    }

    /// The window whose first token is `start`.
    pub(crate) fn at(&self, start: usize) -> Window {
        let ids = (start..=start + self.seq_len).map(|i| self.tokens.id(i)).collect();
        Window { start, ids, mask: self.mask(start).collect() }
    }

    /// Number of targets of window `index` that count in the loss.
    pub fn target_tokens(&self, index: usize) -> usize {
        self.mask(self.start(index)).filter(|&learned| learned).count()
    }

    /// Number of windows among the first `limit` of the first epoch without a target that counts in the loss.
    pub fn without_targets(&self, limit: usize) -> usize {
        if self.tokens.target_tokens() == self.tokens.len() {
            return 0;
        }
        (0..limit.min(self.per_epoch))
            .filter(|&index| !self.mask(self.start(index)).any(|learned| learned))
            .count()
    }

    fn mask(&self, start: usize) -> impl Iterator<Item = bool> + '_ {
        (start + 1..=start + self.seq_len).map(|i| self.tokens.target(i))
    }

    /// The first token of window `index`.
    fn start(&self, index: usize) -> usize {
        let (epoch, place) = (index / self.per_epoch, index % self.per_epoch);
        match self.order {
            Order::Sequential => place * self.seq_len,
            Order::Shuffled { seed } => {
                let key = mix(mix(seed) ^ epoch as u64);
                // The largest offset ends at the last token, so that every token is learned in some epoch.
                let room = self.tokens.len() - self.per_epoch * self.seq_len;
                let offset = (mix(!key) % room as u64) as usize;
                offset + permute(place, self.per_epoch, key) * self.seq_len
            }
        }
    }
}

/// The image of `index` under a pseudo-random permutation of `0..n` chosen by `key`.
///
/// A Feistel network permutes the `4^k >= n` numbers; walking its cycle until a number below `n` comes up restricts it
/// to a permutation of those.
///
/// # Source
/// Black and Rogaway, Ciphers with Arbitrary Finite Domains (2002), method 2 (cycle walking) on a Feistel network.
fn permute(index: usize, n: usize, key: u64) -> usize {
    const ROUNDS: u64 = 6;
    let bits = usize::BITS - (n - 1).leading_zeros();
    let half = bits.div_ceil(2).max(1);
    let low = (1u64 << half) - 1;
    let mut number = index as u64;
    loop {
        let (mut left, mut right) = (number >> half, number & low);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ (mix(key ^ mix(round << 32 ^ right)) & low));
        }
        number = left << half | right;
        if number < n as u64 {
            return number as usize;
        }
    }
}

/// A bijection of 64-bit words that looks random.
fn mix(x: u64) -> u64 {
    seed::mix(x, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{corpus::Document, tokens::tests::byte_tokens};
    use proptest::prelude::*;

    /// `n` tokens: `n - 1` bytes that count up, and the end of text.
    fn counting(n: usize) -> Arc<TokenFile> {
        byte_tokens(&[Document::Text((0..n - 1).map(|i| char::from(i as u8 % 128)).collect())])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_key_permutes_every_range(n in 1usize..2000, key: u64) {
            let mut seen = vec![false; n];
            for i in 0..n {
                let image = permute(i, n, key);
                prop_assert!(!seen[image]);
                seen[image] = true;
            }
        }

        #[test]
        fn an_epoch_visits_its_windows_once_each(
            n in 2usize..600, seq_len in 1usize..40, seed: u64, epoch in 0usize..1000,
        ) {
            prop_assume!(n > seq_len);
            let windows = TokenWindows::new(counting(n), seq_len, seed).unwrap();
            let first = epoch * windows.per_epoch();
            let mut starts: Vec<_> = (first..first + windows.per_epoch()).map(|i| windows.start(i)).collect();
            starts.sort_unstable();
            prop_assert!(starts.windows(2).all(|pair| pair[1] - pair[0] == seq_len));
            prop_assert!(starts.last().unwrap() + seq_len < n);
            // Less than two windows of the corpus are left out.
            prop_assert!(n - 1 - starts.len() * seq_len < 2 * seq_len);
        }

        #[test]
        fn a_window_is_a_pure_function_of_seed_and_index(n in 50usize..300, seed: u64, index in 0usize..100_000) {
            let tokens = counting(n);
            let windows = TokenWindows::new(tokens.clone(), 8, seed).unwrap();
            // Whatever was asked before, and in a fresh object.
            let window = windows.get(index);
            (0..20).for_each(|i| { windows.get(index + i); });
            prop_assert_eq!(&windows.get(index), &window);
            prop_assert_eq!(&TokenWindows::new(tokens, 8, seed).unwrap().get(index), &window);
        }
    }

    #[test]
    fn every_token_is_a_target_in_some_epoch() {
        for (n, seq_len) in [(9, 8), (15, 8), (16, 8), (17, 8), (101, 7), (500, 32), (5, 1)] {
            let windows = TokenWindows::new(counting(n), seq_len, 3).unwrap();
            let mut seen = vec![false; n];
            for i in 0..windows.per_epoch() * 400 {
                let start = windows.start(i);
                seen[start + 1..=start + seq_len].fill(true);
            }
            assert!(seen[1..].iter().all(|&seen| seen), "{n} tokens, windows of {seq_len}");
        }
    }

    #[test]
    fn the_first_window_of_an_epoch_is_any_of_them() {
        let (n, draws) = (5, 5000);
        let mut counts = [0; 5];
        (0..draws).for_each(|epoch| counts[permute(0, n, mix(epoch))] += 1);
        // Binomial with mean 1000 and standard deviation 28.
        assert!(counts.iter().all(|&count| (860..1140).contains(&count)), "{counts:?}");
    }

    #[test]
    fn seeds_and_epochs_differ() {
        let tokens = counting(2000);
        let starts = |seed, epoch| -> Vec<usize> {
            let windows = TokenWindows::new(tokens.clone(), 16, seed).unwrap();
            (0..windows.per_epoch()).map(|i| windows.start(epoch * windows.per_epoch() + i)).collect()
        };
        assert_ne!(starts(0, 0), starts(1, 0));
        assert_ne!(starts(0, 0), starts(0, 1));
        assert!(!starts(0, 0).is_sorted());
    }

    #[test]
    fn sequential_windows_follow_the_text() {
        let windows = TokenWindows::sequential(counting(26), 8).unwrap();
        assert_eq!(windows.per_epoch(), 3);
        for i in 0..3 {
            let expected: Vec<u32> = (i * 8..=i * 8 + 8).collect();
            assert_eq!(windows.get(i as usize).ids, expected);
        }
    }

    #[test]
    fn the_mask_belongs_to_the_targets() {
        let dialogue = Document::Dialogue { question: "ab".into(), answer: "cd".into() };
        let windows = TokenWindows::sequential(byte_tokens(&[dialogue]), 6).unwrap();
        let window = windows.get(0);
        // <|user|> a b <|assistant|> c d <|endoftext|>: the targets from `c` on are learned.
        assert_eq!(window.ids.len(), 7);
        assert_eq!(window.mask, [false, false, false, true, true, true]);
        assert_eq!(windows.target_tokens(0), 3);
    }

    #[test]
    fn windows_without_targets_are_counted() {
        let dialogue = |n: usize| Document::Dialogue { question: "q".repeat(n), answer: "cd".into() };
        let windows = TokenWindows::sequential(byte_tokens(&[dialogue(30), dialogue(9)]), 8).unwrap();
        let none = |limit: usize| (0..limit).filter(|&i| windows.target_tokens(i) == 0).count();
        assert_eq!(windows.per_epoch(), 6);
        for limit in 0..=6 {
            assert_eq!(windows.without_targets(limit), none(limit));
        }
        assert_eq!((windows.without_targets(usize::MAX), none(6)), (3, 3));
        assert_eq!(TokenWindows::new(counting(50), 8, 1).unwrap().without_targets(usize::MAX), 0);
    }

    #[test]
    fn a_corpus_shorter_than_a_window_is_refused() {
        assert!(TokenWindows::new(counting(9), 8, 0).is_ok());
        let message = TokenWindows::new(counting(8), 8, 0).unwrap_err().to_string();
        assert!(message.contains("the train text has 8 tokens") && message.contains("needs 9"), "{message}");
    }
}
