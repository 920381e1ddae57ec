//! [`StopMatcher`]: finds stop strings in text that comes in pieces.

use std::sync::Arc;

/// Cuts a stream of text at the first stop string that is complete.
///
/// Text is held back only while it could be the beginning of a stop string. What is complete in text that may not stop the stream is text like any other.
#[derive(Debug, Clone)]
pub(super) struct StopMatcher {
    stops: Arc<[String]>,
    include: bool,
    held: String,
    /// Bytes of `held` that came when nothing might stop the stream: a stop string ends behind them.
    exempt: usize,
}

/// What a piece of text amounts to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Matched {
    /// Text that is certain now.
    pub text: String,
    /// The stop string that was found, by its place in the list; nothing follows it.
    pub stop: Option<usize>,
}

impl StopMatcher {
    pub fn new(stops: Arc<[String]>, include: bool) -> Self {
        Self {
            stops,
            include,
            held: String::new(),
            exempt: 0,
        }
    }

    /// More text; `stops`: a stop string that it completes ends the stream.
    pub fn push(&mut self, text: &str, stops: bool) -> Matched {
        if self.stops.is_empty() {
            return Matched {
                text: text.to_owned(),
                stop: None,
            };
        }
        self.held.push_str(text);
        if !stops {
            self.exempt = self.held.len();
        }
        // The string that is complete first; of several that end together, the longest.
        let found = self
            .stops
            .iter()
            .enumerate()
            .filter_map(|(which, stop)| {
                let from = (self.exempt + 1).saturating_sub(stop.len());
                let from = (from..self.exempt)
                    .find(|&at| self.held.is_char_boundary(at))
                    .unwrap_or(self.exempt);
                let begin = from + self.held[from..].find(stop.as_str())?;
                Some((begin + stop.len(), begin, which))
            })
            .min();
        if let Some((end, begin, which)) = found {
            self.held.truncate(if self.include { end } else { begin });
            return Matched {
                text: std::mem::take(&mut self.held),
                stop: Some(which),
            };
        }
        let certain = self.held.len() - self.beginning();
        let rest = self.held.split_off(certain);
        self.exempt = self.exempt.saturating_sub(certain);
        Matched {
            text: std::mem::replace(&mut self.held, rest),
            stop: None,
        }
    }

    /// What was held back; the stream ended without completing a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of what is held that could begin a stop string.
    fn beginning(&self) -> usize {
        self.held
            .char_indices()
            .map(|(at, _)| &self.held[at..])
            .find(|tail| self.stops.iter().any(|stop| stop.starts_with(tail)))
            .map_or(0, str::len)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(pieces: &[&str], stops: &[&str], include: bool) -> (String, Option<usize>) {
        run_after(0, pieces, stops, include)
    }

    /// Nothing may stop the stream in the first `exempt` pieces.
    fn run_after(
        exempt: usize,
        pieces: &[&str],
        stops: &[&str],
        include: bool,
    ) -> (String, Option<usize>) {
        let stops: Vec<String> = stops.iter().map(|&s| s.to_owned()).collect();
        let mut matcher = StopMatcher::new(stops.into(), include);
        let mut out = String::new();
        for (at, piece) in pieces.iter().enumerate() {
            let matched = matcher.push(piece, at >= exempt);
            out.push_str(&matched.text);
            if matched.stop.is_some() {
                return (out, matched.stop);
            }
        }
        out.push_str(&matcher.finish());
        (out, None)
    }

    #[test]
    fn a_stop_string_is_found_across_pieces() {
        assert_eq!(
            run(&["one ", "tw", "o three"], &["two"], false),
            ("one ".to_owned(), Some(0))
        );
        assert_eq!(
            run(&["one ", "tw", "o three"], &["two"], true),
            ("one two".to_owned(), Some(0))
        );
    }

    #[test]
    fn text_is_held_only_while_it_may_begin_a_stop_string() {
        let mut matcher = StopMatcher::new(vec!["###".to_owned()].into(), false);
        assert_eq!(matcher.push("a#", true).text, "a");
        assert_eq!(matcher.push("b", true).text, "#b");
        assert_eq!(matcher.push("##", true).text, "");
        assert_eq!(matcher.finish(), "##");
    }

    #[test]
    fn a_stop_string_ends_behind_what_may_not_stop_the_stream() {
        let run = |pieces: &[&str], stops: &[&str]| run_after(1, pieces, stops, false);
        assert_eq!(
            run(&["a two", " b two c"], &["two"]),
            ("a two b ".to_owned(), Some(0))
        );
        assert_eq!(run(&["a tw", "o b"], &["two"]), ("a ".to_owned(), Some(0)));
        // Complete and held for the sake of a longer one, which does not come.
        assert_eq!(run(&["ab", "d"], &["ab", "abc"]), ("abd".to_owned(), None));
        assert_eq!(run(&["éé", "é"], &["éé"]), ("é".to_owned(), Some(0)));
    }

    proptest! {
        #[test]
        fn pieces_give_what_the_whole_text_gives(
            text in "[abé]{0,40}",
            stops in prop::collection::vec("[abé]{1,4}", 1..4),
            cuts in prop::collection::vec(1_usize..6, 0..40),
            exempt in 0_usize..4,
            include: bool,
        ) {
            let chars: Vec<char> = text.chars().collect();
            let mut pieces = Vec::new();
            let mut rest = &chars[..];
            for cut in cuts.into_iter().chain([usize::MAX]) {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece.iter().collect::<String>());
                rest = after;
            }
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let (got, stop) = run_after(exempt, &pieces, &stops, include);
            let exempt: usize = pieces.iter().take(exempt).map(|piece| piece.len()).sum();
            // The first place behind it where some stop string is complete.
            let first = text
                .char_indices()
                .flat_map(|(at, _)| stops.iter().map(move |s| (at + s.len(), at, s)))
                .filter(|&(end, at, s)| end > exempt && text[at..].starts_with(s))
                .map(|(end, at, _)| (end, at))
                .min();
            match first {
                None => {
                    prop_assert_eq!(got, text);
                    prop_assert_eq!(stop, None);
                }
                Some((end, begin)) => {
                    let cut = if include { end } else { begin };
                    // A piece that completes two stop strings at once may be cut at either's first occurrence.
                    prop_assert_eq!(&got, &text[..cut]);
                    prop_assert!(stop.is_some());
                }
            }
        }
    }
}
