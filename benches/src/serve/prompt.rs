//! The words of a load: random, seeded, the same for every server that is to be compared.

use super::ask::Prompt;
use crate::random::Random;

/// Makes the prompts of a load.
#[derive(Debug, Clone, Copy)]
pub struct Prompts {
    /// Chooses the words.
    pub seed: u64,
    /// How many at the beginning are the same in all.
    pub shared: u32,
    /// Ids below this; `None`: words.
    pub vocab: Option<u32>,
}

/// Short and common: most tokenizers have each, with the space before it, as one token.
const WORDS: [&str; 64] = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "law",
    "car",
];

impl Prompts {
    /// The `n`th prompt, of so many words or ids.
    pub fn nth(&self, n: u64, tokens: u32) -> Prompt {
        let mut shared = Random::nth(self.seed, u64::MAX - 1);
        let mut own = Random::nth(self.seed, n);
        let choices = self.vocab.map_or(WORDS.len() as u64, u64::from);
        let chosen = (0..tokens).map(|at| {
            if at < self.shared {
                shared.below(choices)
            } else {
                own.below(choices)
            }
        });
        if self.vocab.is_some() {
            Prompt::Ids(chosen.map(|id| id as u32).collect())
        } else {
            let words: Vec<&str> = chosen.map(|word| WORDS[word as usize]).collect();
            Prompt::Text(words.join(" "))
        }
    }

    /// Words that no other prompt begins with, for the later turns of a conversation.
    pub fn words(random: &mut Random, tokens: u32) -> String {
        let words: Vec<&str> = (0..tokens)
            .map(|_| WORDS[random.below(WORDS.len() as u64) as usize])
            .collect();
        words.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_share_what_they_are_to_share_and_no_more() {
        let prompts = Prompts {
            seed: 5,
            shared: 16,
            vocab: Some(1000),
        };
        let (Prompt::Ids(a), Prompt::Ids(b)) = (prompts.nth(0, 40), prompts.nth(1, 40)) else {
            panic!("ids were asked for");
        };
        assert_eq!((a.len(), b.len()), (40, 40));
        assert_eq!(a[..16], b[..16]);
        assert_ne!(a[16..], b[16..]);
        assert!(a.iter().all(|&id| id < 1000));
        assert_eq!(prompts.nth(1, 40), Prompt::Ids(b), "they repeat");
    }

    #[test]
    fn text_has_a_word_for_each_token() {
        let prompts = Prompts {
            seed: 5,
            shared: 0,
            vocab: None,
        };
        let Prompt::Text(text) = prompts.nth(0, 40) else {
            panic!("text was asked for");
        };
        assert_eq!(text.split(' ').count(), 40);
    }
}
