//! [`StopSequences`]: ends a streamed text before the first stop sequence.

/// Cuts a text, which arrives in pieces, before the first stop sequence that is complete.
///
/// Text that may be the beginning of a stop sequence is held back until that is decided, so the output does not depend on the
/// pieces.
#[derive(Clone, Debug, Default)]
pub struct StopSequences {
    strings: Vec<String>,
    /// The end of the text, which may begin a stop sequence.
    held: String,
    found: bool,
}

impl StopSequences {
    /// Empty strings are ignored.
    pub fn new(mut strings: Vec<String>) -> Self {
        strings.retain(|string| !string.is_empty());
        Self { strings, held: String::new(), found: false }
    }

    /// Takes the next piece, and returns the text that can be sent.
    pub fn push(&mut self, piece: &str) -> String {
        if self.found {
            return String::new();
        }
        self.held.push_str(piece);
        let places = self.strings.iter().filter_map(|string| {
            let start = self.held.find(string.as_str())?;
            Some((start + string.len(), start))
        });
        if let Some((_, start)) = places.min() {
            self.found = true;
            self.held.truncate(start);
            return std::mem::take(&mut self.held);
        }
        let begins =
            |place: &usize| self.strings.iter().any(|string| string.starts_with(&self.held[*place..]));
        let place = self.held.char_indices().map(|(place, _)| place).find(begins);
        let tail = self.held.split_off(place.unwrap_or(self.held.len()));
        std::mem::replace(&mut self.held, tail)
    }

    /// Whether a stop sequence has ended the text.
    pub fn found(&self) -> bool {
        self.found
    }

    /// The text that was held back, at the end.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut stops = StopSequences::new(stops.iter().map(|stop| stop.to_string()).collect());
        let mut out: Vec<String> = pieces.iter().map(|piece| stops.push(piece)).collect();
        out.push(stops.finish());
        (out, stops.found())
    }

    #[test]
    fn the_beginning_of_a_stop_sequence_is_held_back() {
        let (out, found) = run(&["\n\nUser"], &["quack\n", "\nUs", "eful"]);
        assert_eq!(out, ["quack", "", "\n\nUseful", ""]);
        assert!(!found);
        let (out, found) = run(&["\n\nUser"], &["quack\n", "\nUs", "er: hi", "more"]);
        assert_eq!(out, ["quack", "", "", "", ""]);
        assert!(found);
        assert_eq!(run(&["\n\nUser"], &["quack\n"]).0, ["quack", "\n"]);
    }

    #[test]
    fn a_text_is_cut_at_the_same_place_for_all_pieces() {
        let text = "aabab🦆caab🦆🦆abcab";
        let characters: Vec<String> = text.chars().map(String::from).collect();
        let lists: [&[&str]; 8] = [
            &["aab"],
            &["abc", "b🦆"],
            &["🦆🦆"],
            &["bab🦆caab🦆🦆x", "caa"],
            &["zz"],
            &["abcabc"],
            &["b", "abab"],
            &[],
        ];
        for stops in lists {
            // By the definition: the shortest prefix that ends with a stop sequence.
            let ends = |end: usize| stops.iter().filter(move |stop| text[..end].ends_with(**stop));
            let first =
                (0..=text.len()).filter(|end| text.is_char_boundary(*end)).find(|end| ends(*end).count() > 0);
            let longest = |end| ends(end).map(|stop| stop.len()).max().unwrap();
            let expected = first.map_or(text, |end| &text[..end - longest(end)]);
            for seed in 0u64..500 {
                let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let mut pieces = vec![String::new()];
                for character in &characters {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    if state >> 62 == 0 {
                        pieces.push(String::new());
                    }
                    pieces.last_mut().unwrap().push_str(character);
                }
                let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
                let (out, found) = run(stops, &pieces);
                assert_eq!(out.concat(), expected, "{stops:?} {pieces:?}");
                assert_eq!(found, first.is_some());
            }
        }
    }
}
