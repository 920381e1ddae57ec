//! A template's source as minijinja should read it to do what jinja2 does.
//!
//! Some things cannot be taught to minijinja from outside, so the source is changed where they occur, in place:
//!
//! - `{% generation %}` marks what training counts as the assistant's own; transformers renders its contents. So does `{% if true %}`.
//! - `{% for x in none %}` raises in Python: what a loop runs over goes through a filter that does.
//! - `'%s' % x` formats, where the left side is a literal.
//! - `a ~ b` makes texts of lists, which can be endless for all their brevity: what it joins goes through a filter that looks first.
//! - `{% set x = [x] %}`, repeated, makes a value so deep that dropping it overflows the stack: what is kept goes through a filter that
//!   refuses such values. (It is the only way to keep something from one turn of a loop to the next.)
//!
//! - `a == b` walks over all of both, which is one instruction for minijinja: what is compared goes through a filter that pays. So do what `in`
//!   looks for and into, keys of dicts, subscripts and what `loop.changed` is told, but not what is cheap to compare.
//!
//! What is not understood is left as it is, for the compiler to complain about.

mod comparisons;

use std::collections::HashSet;

use super::guards::{CONCATENATED, KEPT, KEPT_IN_NAMESPACE};
use super::python::{ITERATED, PRINTF};

/// Words that stand between operands.
const KEYWORDS: [&str; 9] = [
    "and",
    "or",
    "not",
    "in",
    "is",
    "if",
    "else",
    "recursive",
    "scoped",
];
/// Most tokens between one pair of braces, and most `elif`s of a template: minijinja's parser recurses over both. Real templates have a few
/// dozen.
const MOST_TOKENS: usize = 1500;
const MOST_ELIFS: usize = 1000;

/// The template for minijinja.
///
/// # Errors
/// It is so long-winded that compiling it could overflow the stack.
pub(super) fn adapt(source: &str) -> Result<String, String> {
    // jinja2 reads every kind of line end as `\n`.
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut edits = Vec::new();
    let mut elifs = 0;
    let mut at = 0;
    while let Some(begin) = find_block(&source, at) {
        let Some(block) = Block::read(&source, begin)? else {
            break;
        };
        elifs += usize::from(block.word(&source, 0) == Some("elif"));
        if elifs > MOST_ELIFS {
            return Err(format!("more than {MOST_ELIFS} `elif`s"));
        }
        block.edit(&source, &mut edits);
        at = block.end;
        if block.word(&source, 0) == Some("raw") {
            at = end_of_raw(&source, at);
        }
    }
    let mut out = String::with_capacity(source.len() + 64);
    let mut done = 0;
    // Stable: edits at one place stay in the order in which they were made.
    edits.sort_by_key(|edit| edit.begin);
    for edit in edits {
        out.push_str(&source[done..edit.begin]);
        out.push_str(&edit.text);
        done = edit.end;
    }
    out.push_str(&source[done..]);
    Ok(out)
}

/// `source[begin..end]` becomes `text`.
struct Edit {
    begin: usize,
    end: usize,
    text: String,
}

impl Edit {
    fn insert(at: usize, text: impl Into<String>) -> Self {
        Self {
            begin: at,
            end: at,
            text: text.into(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Word,
    String,
    /// One character.
    Sign(u8),
}

#[derive(Debug, Clone, Copy)]
struct Token {
    kind: Kind,
    begin: usize,
    end: usize,
    /// Brackets around it.
    depth: usize,
}

/// `{{ … }}` or `{% … %}`.
struct Block {
    statement: bool,
    tokens: Vec<Token>,
    /// Behind its closing braces.
    end: usize,
}

/// Where the next `{{` or `{%` is, comments left out.
fn find_block(source: &str, mut at: usize) -> Option<usize> {
    loop {
        let begin = at + source[at..].find('{')?;
        match source.as_bytes().get(begin + 1)? {
            b'{' | b'%' => return Some(begin),
            b'#' => at = begin + 2 + source[begin + 2..].find("#}")? + 2,
            _ => at = begin + 1,
        }
    }
}

fn end_of_raw(source: &str, from: usize) -> usize {
    let mut at = from;
    while let Some(begin) = source[at..].find("{%").map(|found| at + found) {
        let inner = source[begin + 2..]
            .trim_start_matches(['-', '+'])
            .trim_start();
        if inner.starts_with("endraw") {
            return begin;
        }
        at = begin + 2;
    }
    source.len()
}

impl Block {
    /// The block that begins at `begin`; `None` if it has no end.
    fn read(source: &str, begin: usize) -> Result<Option<Self>, String> {
        let bytes = source.as_bytes();
        let statement = bytes[begin + 1] == b'%';
        let close = if statement { "%}" } else { "}}" };
        let mut tokens = Vec::new();
        let mut depth = 0_usize;
        let mut at = begin + 2;
        if matches!(bytes.get(at), Some(b'-' | b'+')) {
            at += 1;
        }
        while let Some(&byte) = bytes.get(at) {
            let rest = &source[at..];
            let ending = rest.strip_prefix(['-', '+']).unwrap_or(rest);
            if depth == 0 && ending.starts_with(close) {
                let end = at + (rest.len() - ending.len()) + 2;
                return Ok(Some(Self {
                    statement,
                    tokens,
                    end,
                }));
            }
            let (kind, length) = match byte {
                b' ' | b'\t' | b'\n' => {
                    at += 1;
                    continue;
                }
                b'\'' | b'"' => match string_length(rest) {
                    Some(length) => (Kind::String, length),
                    None => break,
                },
                _ if is_word(rest) => (Kind::Word, word_length(rest)),
                _ => (
                    Kind::Sign(byte),
                    rest.chars().next().map_or(1, char::len_utf8),
                ),
            };
            if let Kind::Sign(b')' | b']' | b'}') = kind {
                depth = depth.saturating_sub(1);
            }
            tokens.push(Token {
                kind,
                begin: at,
                end: at + length,
                depth,
            });
            if tokens.len() > MOST_TOKENS {
                let line = source[..begin].matches('\n').count() + 1;
                return Err(format!(
                    "an expression of more than {MOST_TOKENS} tokens (line {line} of the template)"
                ));
            }
            if let Kind::Sign(b'(' | b'[' | b'{') = kind {
                depth += 1;
            }
            at += length;
        }
        Ok(None)
    }

    /// The token's text, if it is a word of a statement.
    fn word<'a>(&self, source: &'a str, at: usize) -> Option<&'a str> {
        let token = self.tokens.get(at)?;
        (self.statement && token.kind == Kind::Word).then(|| &source[token.begin..token.end])
    }

    fn sign(&self, at: usize) -> Option<u8> {
        match self.tokens.get(at)?.kind {
            Kind::Sign(sign) => Some(sign),
            _ => None,
        }
    }

    fn is_string(&self, at: usize) -> bool {
        self.tokens
            .get(at)
            .is_some_and(|token| token.kind == Kind::String)
    }

    fn edit(&self, source: &str, edits: &mut Vec<Edit>) {
        let replace = |text: &str| Edit {
            begin: self.tokens[0].begin,
            end: self.tokens[0].end,
            text: text.to_owned(),
        };
        // First, so that what it ends is ended first.
        self.format_strings(edits);
        self.guard_concatenations(source, edits);
        self.guard_comparisons(source, edits);
        self.guard_keys(source, edits);
        match self.word(source, 0) {
            Some("generation") if self.tokens.len() == 1 => edits.push(replace("if true")),
            Some("endgeneration") if self.tokens.len() == 1 => edits.push(replace("endif")),
            Some("for") => self.guard_loop(source, edits),
            Some("set") => self.guard_assignment(edits),
            _ => {}
        }
    }

    /// `for x in list if …` becomes `for x in (list)|__iterated if …`.
    fn guard_loop(&self, source: &str, edits: &mut Vec<Edit>) {
        let Some(marker) = self.loop_marker(source) else {
            return;
        };
        let end = (marker + 1..self.tokens.len())
            .filter(|&at| self.tokens[at].depth == 0)
            .find(|&at| matches!(self.word(source, at), Some("if" | "recursive")))
            .unwrap_or(self.tokens.len());
        self.filter(marker + 1, end, ITERATED, edits);
    }

    /// The `in` of a `for`.
    fn loop_marker(&self, source: &str) -> Option<usize> {
        if self.word(source, 0) != Some("for") {
            return None;
        }
        (1..self.tokens.len())
            .find(|&at| self.tokens[at].depth == 0 && self.word(source, at) == Some("in"))
    }

    /// `set x = …` becomes `set x = (…)|__kept`.
    fn guard_assignment(&self, edits: &mut Vec<Edit>) {
        let is_assignment = |&at: &usize| self.tokens[at].depth == 0 && self.sign(at) == Some(b'=');
        let Some(marker) = (1..self.tokens.len()).find(is_assignment) else {
            return;
        };
        let dotted = (1..marker).any(|at| self.sign(at) == Some(b'.'));
        let filter = if dotted { KEPT_IN_NAMESPACE } else { KEPT };
        self.filter(marker + 1, self.tokens.len(), filter, edits);
    }

    /// `a ~ b` becomes `(a)|__concatenated ~ (b)|__concatenated`.
    fn guard_concatenations(&self, source: &str, edits: &mut Vec<Edit>) {
        // Where right sides begin: the right side of one `~` is the left side of the next.
        let mut rights = HashSet::new();
        for at in 1..self.tokens.len() {
            if self.sign(at) != Some(b'~') {
                continue;
            }
            let begin = (0..at).rfind(|&i| self.delimits(source, i, at));
            let begin = begin.map_or(0, |before| before + 1);
            let mut words = (0..begin).rev().map(|at| self.text(source, at));
            let tested = words.find(|&word| word != "not") == Some("is");
            if !rights.contains(&begin) && !tested {
                self.filter(begin, at, CONCATENATED, edits);
            }
            let end = (at + 1..self.tokens.len()).find(|&i| self.delimits(source, i, at));
            let end = end.unwrap_or(self.tokens.len());
            self.filter(at + 1, end, CONCATENATED, edits);
            rights.insert(at + 1);
        }
    }

    /// Whether the token at `at` ends an operand of the `~` at `operator`.
    fn delimits(&self, source: &str, at: usize, operator: usize) -> bool {
        let (token, depth) = (self.tokens[at], self.tokens[operator].depth);
        if token.depth != depth {
            return token.depth < depth;
        }
        match token.kind {
            Kind::String => false,
            Kind::Word => {
                let first = at == 0 && self.statement;
                let attribute = at > 0 && self.sign(at - 1) == Some(b'.');
                first || !attribute && KEYWORDS.contains(&self.text(source, at))
            }
            Kind::Sign(b'+' | b'-') => at > 0 && self.ends_operand(source, at - 1),
            Kind::Sign(sign) => b"~,:=<>!".contains(&sign),
        }
    }

    /// Whether what stands behind the token at `at` is a binary operator: a sign that could be unary is then none.
    fn ends_operand(&self, source: &str, at: usize) -> bool {
        match self.tokens[at].kind {
            Kind::String | Kind::Sign(b')' | b']' | b'}') => true,
            Kind::Word => !KEYWORDS.contains(&self.text(source, at)),
            Kind::Sign(_) => false,
        }
    }

    fn text<'a>(&self, source: &'a str, at: usize) -> &'a str {
        &source[self.tokens[at].begin..self.tokens[at].end]
    }

    /// Puts the expression that is the tokens from `first` up to `end` through a filter.
    fn filter(&self, first: usize, end: usize, filter: &str, edits: &mut Vec<Edit>) {
        if first < end {
            edits.push(Edit::insert(self.tokens[first].begin, "("));
            edits.push(Edit::insert(
                self.tokens[end - 1].end,
                format!(")|{filter}"),
            ));
        }
    }

    /// `'…' % x` becomes `('…'|__printf(x))`.
    fn format_strings(&self, edits: &mut Vec<Edit>) {
        for at in 1..self.tokens.len() {
            if self.sign(at) != Some(b'%') || !self.is_string(at - 1) {
                continue;
            }
            // Literals that stand side by side are one.
            let first = (0..at).rev().take_while(|&at| self.is_string(at)).last();
            let (Some(first), Some(end)) = (first, self.operand_end(at + 1)) else {
                continue;
            };
            edits.push(Edit::insert(self.tokens[first].begin, "("));
            edits.push(Edit {
                begin: self.tokens[at].begin,
                end: self.tokens[at].end,
                text: format!("|{PRINTF}("),
            });
            edits.push(Edit::insert(self.tokens[end - 1].end, "))"));
        }
    }

    /// Behind the operand of a `%` that begins at token `at`: a sign, a primary expression, its attributes, calls and filters.
    fn operand_end(&self, mut at: usize) -> Option<usize> {
        while let Some(b'-' | b'+') = self.sign(at) {
            at += 1;
        }
        at = match self.tokens.get(at)?.kind {
            Kind::Sign(b'(' | b'[' | b'{') => self.closing(at)? + 1,
            Kind::Sign(_) => return None,
            Kind::Word => at + 1,
            Kind::String => (at..=self.tokens.len()).find(|&at| !self.is_string(at))?,
        };
        loop {
            at = match self.sign(at) {
                Some(b'.' | b'|') if self.tokens.get(at + 1)?.kind == Kind::Word => at + 2,
                Some(b'(' | b'[') => self.closing(at)? + 1,
                _ => return Some(at),
            };
        }
    }

    /// The bracket that closes the one at `open`.
    fn closing(&self, open: usize) -> Option<usize> {
        let depth = self.tokens[open].depth;
        (open + 1..self.tokens.len()).find(|&at| {
            self.tokens[at].depth == depth && matches!(self.sign(at), Some(b')' | b']' | b'}'))
        })
    }
}

/// Bytes of the string literal that `text` begins with.
fn string_length(text: &str) -> Option<usize> {
    let quote = text.as_bytes()[0];
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            byte if byte == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

fn is_word(text: &str) -> bool {
    text.starts_with(|c: char| c.is_alphanumeric() || c == '_')
}

fn word_length(text: &str) -> usize {
    text.find(|c: char| !c.is_alphanumeric() && c != '_')
        .unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapted(source: &str) -> String {
        adapt(source).expect("short enough")
    }

    #[test]
    fn what_needs_no_change_is_left_alone() {
        for source in [
            "a {{ b % 2 }} {# {% for x in y %} #} {% if 'x' in y %}{% endif %}",
            "{{ '{% generation %}' }} {{ {'a': {}} }} {% if x == \"}}\" %}{% set x | f(a=1) %}{% endset %}",
            "{% raw %}{% for x in y %}{{ '%s' % x }}{% endraw %}",
            "{% for %}{{ '%s' % }}{{ open",
            "{",
            "{% for x in %}",
            "{{ 'open",
        ] {
            assert_eq!(adapt(source).as_deref(), Ok(source));
        }
    }

    #[test]
    fn generation_marks_become_conditions() {
        assert_eq!(
            adapted("{%- generation -%}x{%endgeneration%}"),
            "{%- if true -%}x{%endif%}"
        );
    }

    #[test]
    fn loops_are_guarded() {
        assert_eq!(
            adapted("{%- for k, (a, b) in x.items()[1:] if a in b recursive -%}"),
            "{%- for k, (a, b) in (x.items()[1:])|__iterated if (a)|__compared in (b)|__searched recursive -%}"
        );
        assert_eq!(
            adapted("{% for x in a if a else b %}"),
            "{% for x in (a)|__iterated if a else b %}"
        );
    }

    #[test]
    fn literals_format() {
        assert_eq!(
            adapted("{{ 'a' + '%s' '%d' % (x, y[1]) + z }}"),
            "{{ 'a' + ('%s' '%d' |__printf( (x, y[1]))) + z }}"
        );
        assert_eq!(
            adapted("{% set y = '%s' % x.y(1)|upper %}"),
            "{% set y = (('%s' |__printf( x.y(1)|upper)))|__kept %}"
        );
    }

    #[test]
    fn what_is_concatenated_is_guarded() {
        for (source, expected) in [
            (
                "{{ a ~ b ~ c }}",
                "{{ (a)|__concatenated ~ (b)|__concatenated ~ (c)|__concatenated }}",
            ),
            (
                "{{ a * 2 + x.in[1] * -1 ~ f(y ~ 'z')|upper - 1 }}",
                "{{ a * 2 + (x.in[1] * -1)|__concatenated ~ (f((y)|__concatenated ~ ('z')|__concatenated)|upper)|__concatenated - 1 }}",
            ),
            (
                "{% if not a ~ b == c and d ~ -e %}",
                "{% if not ((a)|__concatenated ~ (b)|__concatenated)|__compared == (c)|__compared and (d)|__concatenated ~ (-e)|__concatenated %}",
            ),
            (
                "{{ a is string ~ b }}",
                "{{ a is string ~ (b)|__concatenated }}",
            ),
            (
                "{{ a is not string ~ b }}",
                "{{ a is not string ~ (b)|__concatenated }}",
            ),
            (
                "{% set x = '%s' % y ~ z %}",
                "{% set x = ((('%s' |__printf( y)))|__concatenated ~ (z)|__concatenated)|__kept %}",
            ),
        ] {
            assert_eq!(adapted(source), expected);
        }
    }

    #[test]
    fn assignments_are_guarded() {
        assert_eq!(
            adapted("{%- set a, ns.b = x == y, 1 -%}"),
            "{%- set a, ns.b = ((x)|__compared == (y)|__compared, 1)|__kept_in_namespace -%}"
        );
    }

    #[test]
    fn line_ends_become_one_kind() {
        assert_eq!(adapted("a\r\nb\rc\n"), "a\nb\nc\n");
    }
}
