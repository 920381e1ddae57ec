//! Where a template compares: operands, keys and subscripts go through filters that pay for what minijinja does not charge.

use std::collections::HashSet;

use super::{Block, Edit, KEYWORDS, Kind};
use crate::tokenizer::template::guards::{COMPARED, HASHED, SEARCHED};

/// Bytes of a literal that are compared at no cost to speak of.
const SHORT: usize = 1000;

/// What a token is for a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Ends one, that is.
    Operand,
    /// A word between operands.
    Separator,
    Other,
}

impl Block {
    /// `a == b` becomes `(a)|__compared == (b)|__compared`, `a in b` becomes `(a)|__compared in (b)|__searched`.
    pub(super) fn guard_comparisons(&self, source: &str, edits: &mut Vec<Edit>) {
        let marker = self.loop_marker(source);
        let roles = self.roles(source);
        // In a chain, the right side of one operator is the left side of the next.
        let mut guarded = HashSet::new();
        for at in 1..self.tokens.len() {
            let Some((left, right)) = self.comparison(source, &roles, at) else {
                continue;
            };
            if marker == Some(at) {
                continue;
            }
            let depth = self.tokens[at].depth;
            let begin = (0..left).rfind(|&i| self.ends_comparison(&roles, i, depth));
            let begin = begin.map_or(0, |before| before + 1);
            let end = (right..self.tokens.len()).find(|&i| self.ends_comparison(&roles, i, depth));
            let end = end.unwrap_or(self.tokens.len());
            let search = self.text(source, at) == "in";
            // In a text, `in` looks for the text of whatever it is given.
            let cheap = self.is_cheap(source, right, end) && (!search || self.is_list(right, end));
            if cheap || self.is_cheap(source, begin, left) {
                continue;
            }
            for (begin, end, filter) in [
                (begin, left, COMPARED),
                (right, end, if search { SEARCHED } else { COMPARED }),
            ] {
                if guarded.insert((begin, filter)) {
                    self.filter(begin, end, filter, edits);
                }
            }
        }
    }

    /// If a comparison's operator is at `at`: where its left side ends and its right side begins.
    fn comparison(&self, source: &str, roles: &[Role], at: usize) -> Option<(usize, usize)> {
        match self.tokens[at].kind {
            Kind::Word if roles[at] == Role::Separator && self.text(source, at) == "in" => {
                let negated = self.text(source, at - 1) == "not";
                Some((at - usize::from(negated), at + 1))
            }
            Kind::Sign(sign) if b"=!<>".contains(&sign) => {
                let joined = |first: usize| {
                    self.sign(first + 1) == Some(b'=')
                        && self.tokens[first].end == self.tokens[first + 1].begin
                };
                let second = self
                    .sign(at - 1)
                    .is_some_and(|sign| b"=!<>".contains(&sign));
                match sign {
                    _ if second && joined(at - 1) => None,
                    _ if joined(at) => Some((at, at + 2)),
                    b'<' | b'>' => Some((at, at + 1)),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// Whether the token at `at` ends an operand of a comparison at `depth`.
    fn ends_comparison(&self, roles: &[Role], at: usize, depth: usize) -> bool {
        let token = self.tokens[at];
        if token.depth != depth {
            return token.depth < depth;
        }
        match token.kind {
            Kind::String => false,
            Kind::Word => roles[at] == Role::Separator,
            Kind::Sign(sign) => b",:=<>!".contains(&sign),
        }
    }

    /// What each token is for comparisons; names can be spelt like keywords.
    fn roles(&self, source: &str) -> Vec<Role> {
        let mut roles: Vec<Role> = Vec::with_capacity(self.tokens.len());
        for at in 0..self.tokens.len() {
            let before = |back: usize| at.checked_sub(back).map_or("", |at| self.text(source, at));
            let behind_operand = |back: usize| at >= back && roles[at - back] == Role::Operand;
            let role = match (self.tokens[at].kind, self.text(source, at)) {
                (Kind::Word, _) if at == 0 && self.statement => Role::Separator,
                (Kind::Word, _) if [".", "|"].contains(&before(1)) => Role::Operand,
                (Kind::Word, "not") if before(1) == "is" && roles[at - 1] == Role::Other => {
                    Role::Other
                }
                (Kind::Word, "not") => Role::Separator,
                (Kind::Word, "in") if before(1) == "not" && behind_operand(2) => Role::Separator,
                (Kind::Word, "is") if behind_operand(1) => Role::Other,
                (Kind::Word, word) if behind_operand(1) && KEYWORDS.contains(&word) => {
                    Role::Separator
                }
                (Kind::Word | Kind::String | Kind::Sign(b')' | b']' | b'}'), _) => Role::Operand,
                (Kind::Sign(_), _) => Role::Other,
            };
            roles.push(role);
        }
        roles
    }

    /// Whether the tokens from `first` up to `end` are a short literal or a list of such.
    fn is_cheap(&self, source: &str, first: usize, end: usize) -> bool {
        let depth = self.tokens.get(first).map_or(0, |token| token.depth);
        first < end
            && (first..end).all(|at| match self.tokens[at].kind {
                Kind::String => self.text(source, at).len() < SHORT,
                Kind::Word => {
                    let word = self.text(source, at);
                    word.starts_with(|c: char| c.is_ascii_digit())
                        || ["true", "false", "none"].contains(&word.to_lowercase().as_str())
                }
                Kind::Sign(b'[' | b']' | b'(' | b')') => self.tokens[at].depth == depth,
                Kind::Sign(sign) => b"-.,".contains(&sign),
            })
    }

    /// Whether the tokens from `first` up to `end` are a literal list.
    fn is_list(&self, first: usize, end: usize) -> bool {
        let comma = || (first..end).any(|at| self.sign(at) == Some(b','));
        let opens = self.sign(first) == Some(b'[') || self.sign(first) == Some(b'(') && comma();
        opens && self.closing(first) == Some(end - 1)
    }

    /// `x[a]` becomes `x[(a)|__compared]`, `{a: b}` becomes `{(a)|__hashed: b}`, `x.changed(a)` becomes `x.changed((a)|__compared)`.
    pub(super) fn guard_keys(&self, source: &str, edits: &mut Vec<Edit>) {
        let roles = self.roles(source);
        for open in 0..self.tokens.len() {
            let changed = open > 1
                && self.text(source, open - 1) == "changed"
                && self.sign(open - 2) == Some(b'.');
            let filter = match self.sign(open) {
                Some(b'{') => HASHED,
                Some(b'[') if open > 0 && roles[open - 1] == Role::Operand => COMPARED,
                Some(b'(') if changed => COMPARED,
                _ => continue,
            };
            let Some(close) = self.closing(open) else {
                continue;
            };
            let depth = self.tokens[open].depth + 1;
            let splits = |&at: &usize| {
                self.tokens[at].depth == depth && matches!(self.sign(at), Some(b',' | b':'))
            };
            let mut begin = open + 1;
            let mut key = true;
            while begin < close {
                let end = (begin..close).find(splits).unwrap_or(close);
                let paired = self.sign(end) == Some(b':');
                if paired && filter == COMPARED {
                    // A slice.
                    break;
                }
                let first = self.value_of_argument(begin, end);
                if key && !self.is_cheap(source, first, end) {
                    self.filter(first, end, filter, edits);
                }
                // Behind a colon is what a key stands for.
                key = !paired;
                begin = end + 1;
            }
        }
    }

    /// Where the value of an argument begins: behind `*`, `**` or `name=`.
    fn value_of_argument(&self, begin: usize, end: usize) -> usize {
        let named = begin + 1 < end
            && self.tokens[begin].kind == Kind::Word
            && self.sign(begin + 1) == Some(b'=')
            && self.sign(begin + 2) != Some(b'=');
        let stars = |at: &usize| self.sign(*at) == Some(b'*');
        begin
            + if named {
                2
            } else {
                (begin..end).take_while(stars).count()
            }
    }
}

#[cfg(test)]
mod tests {
    use super::super::adapt;
    use super::*;

    fn adapted(source: &str) -> String {
        adapt(source).expect("short enough")
    }

    #[test]
    fn what_is_compared_is_guarded() {
        for (source, expected) in [
            ("{{ a==b }}", "{{ (a)|__compared==(b)|__compared }}"),
            (
                "{{ a + b < c | d(e) >= f.in }}",
                "{{ (a + b)|__compared < (c | d(e))|__compared >= (f.in)|__compared }}",
            ),
            (
                "{% for x in a not in b if not c != d recursive %}",
                "{% for x in ((a)|__compared not in (b)|__searched)|__iterated if not (c)|__compared != (d)|__compared recursive %}",
            ),
            (
                "{{ f(a=b == c, d=e is not in g == h) if i is in j else k in l }}",
                "{{ f(a=(b)|__compared == (c)|__compared, d=(e is not in g)|__compared == (h)|__compared) \
                 if i is in j else (k)|__compared in (l)|__searched }}",
            ),
            (
                "{% set in = in == not in in in %}",
                "{% set in = ((in)|__compared == not (in)|__compared in (in)|__searched)|__kept %}",
            ),
            (
                "{{ a.is not in b and c in 'd' and e in ('f') }}",
                "{{ (a.is)|__compared not in (b)|__searched and (c)|__compared in ('d')|__searched \
                 and (e)|__compared in (('f'))|__searched }}",
            ),
            (
                "{{ a[b] + c[d:e] + {f: g, 'h': i}[-1] + loop.changed(j, *k, l=m)[n == o] }}",
                "{{ a[(b)|__compared] + c[d:e] + {(f)|__hashed: g, 'h': i}[-1] + \
                 loop.changed((j)|__compared, *(k)|__compared, l=(m)|__compared)[((n)|__compared == (o)|__compared)|__compared] }}",
            ),
        ] {
            assert_eq!(adapted(source), expected);
        }
    }

    #[test]
    fn what_is_cheap_to_compare_is_left_alone() {
        for source in [
            "{% if a.b == 'c' and 1.5 > d and none != e and -1 == f %}",
            "{% if a in ['b', 'c'] or a not in ('b', 'c') or 'd' in e %}",
            "{% for a in [b, c] %}{{ d is in e }}{{ f.g['h'][0] }}{% endfor %}",
        ] {
            assert!(!adapted(source).contains(COMPARED), "{}", adapted(source));
        }
    }
}
