//! [`ChatTemplate`]: a model's Jinja template, rendered as transformers renders it.

use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, Error, ErrorKind, State};

use super::{budget, dialect, python};

/// Instructions a template may execute: a hostile one must end. As 64 bytes cost as much as an instruction, it is also about 256 MB at most
/// that one rendering makes. With the templates we know 8 MiB of content take a fifth of it and 16,384 messages half; two that look through
/// all messages at each take it all for some more than a thousand.
const FUEL: u64 = 4_000_000;
/// Characters of an error's message: a template can make it as long as any text.
const LONGEST_MESSAGE: usize = 1000;
const NAME: &str = "chat template";

/// Tells templates the time: given a format, the formatted local time.
pub type Clock = Arc<dyn Fn(&str) -> String + Send + Sync>;

/// A model's chat template (Jinja), compiled.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    special: serde_json::Map<String, serde_json::Value>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ChatTemplate[{} bytes]", self.source.len())
    }
}

/// A conversation to render, in the shape Hugging Face templates expect.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conversation {
    /// Messages as JSON objects: `role`, `content` (string or parts), `tool_calls` …
    pub messages: Vec<serde_json::Value>,
    /// Tool definitions as JSON schema objects; empty for none.
    pub tools: Vec<serde_json::Value>,
    /// End with the header of an assistant message.
    pub add_generation_prompt: bool,
    /// Further variables of the template (`enable_thinking` …).
    pub variables: serde_json::Map<String, serde_json::Value>,
}

/// What is wrong with a template, or with a conversation it refuses.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template is not valid Jinja.
    #[error("the chat template does not compile: {0}")]
    Compile(String),
    /// The template itself refused (`raise_exception`) or could not render this conversation: the client's fault.
    #[error("the chat template refused the conversation: {0}")]
    Render(String),
}

impl ChatTemplate {
    /// `special` are the named special tokens templates refer to: `bos_token`, `eos_token`, `pad_token`, `unk_token`.
    ///
    /// # Errors
    /// The source is not valid Jinja.
    pub fn new(
        source: &str,
        special: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<Self, TemplateError> {
        let clock = |format: &str| {
            jiff::fmt::strtime::format(format, &jiff::Zoned::now())
                .unwrap_or_else(|_| format.to_owned())
        };
        Self::with_clock(source, special, Arc::new(clock))
    }

    /// As [`ChatTemplate::new`], with a clock of the caller's.
    ///
    /// # Errors
    /// The source is not valid Jinja.
    pub fn with_clock(
        source: &str,
        special: &serde_json::Map<String, serde_json::Value>,
        clock: Clock,
    ) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| TemplateError::Compile(describe(&error)))?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        python::add_to(&mut environment);
        environment.add_function(
            "raise_exception",
            |state: &State<'_, '_>, message: &Value| -> Result<Value, Error> {
                budget::text(state, message)?;
                Err(Error::new(ErrorKind::InvalidOperation, message.to_string()))
            },
        );
        environment.add_function("strftime_now", move |format: &str| clock(format));
        let adapted = dialect::adapt(source).map_err(TemplateError::Compile)?;
        environment
            .add_template_owned(NAME, adapted)
            .map_err(|error| TemplateError::Compile(describe(&error)))?;
        Ok(Self {
            environment,
            source: source.to_owned(),
            special: special.clone(),
        })
    }

    /// The prompt's text.
    ///
    /// # Errors
    /// The template refused the conversation.
    pub fn render(&self, conversation: &Conversation) -> Result<String, TemplateError> {
        let mut variables = self.special.clone();
        variables.extend(conversation.variables.clone());
        let messages: Vec<_> = conversation
            .messages
            .iter()
            .map(with_reasoning_aliases)
            .collect();
        variables.insert("messages".to_owned(), messages.into());
        // Defined, as in transformers, whether there are any or not.
        variables
            .entry("documents")
            .or_insert(serde_json::Value::Null);
        // Templates ask `if tools`, and for its absence with `is none`.
        let tools = match &conversation.tools[..] {
            [] => serde_json::Value::Null,
            tools => tools.to_vec().into(),
        };
        variables.insert("tools".to_owned(), tools);
        variables.insert(
            "add_generation_prompt".to_owned(),
            conversation.add_generation_prompt.into(),
        );
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(Value::from(Serde(&variables))))
            .map_err(|error| TemplateError::Render(describe(&error)))
    }

    /// The template's source.
    pub fn source(&self) -> &str {
        &self.source
    }
}

/// The message, without the engine's dump of variables.
fn describe(error: &Error) -> String {
    let mut text = match error.detail() {
        Some(detail) => detail.to_owned(),
        None => error.kind().to_string(),
    };
    if let Some((end, _)) = text.char_indices().nth(LONGEST_MESSAGE) {
        text.truncate(end);
        text.push('…');
    }
    match error.line() {
        Some(line) => format!("{text} (line {line} of the template)"),
        None => text,
    }
}

/// transformers hands a message's reasoning over under every name that templates read.
fn with_reasoning_aliases(message: &serde_json::Value) -> serde_json::Value {
    let known = ["reasoning_content", "thinking", "reasoning"]
        .iter()
        .map(|name| &message[name])
        .find(|value| !value.is_null());
    let (Some(fields), Some(reasoning)) = (message.as_object(), known) else {
        return message.clone();
    };
    let mut aliased = serde_json::Map::new();
    aliased.insert("thinking".to_owned(), reasoning.clone());
    aliased.extend(fields.clone());
    aliased.insert("reasoning_content".to_owned(), reasoning.clone());
    aliased.into()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn template(source: &str) -> ChatTemplate {
        let special = json!({"bos_token": "<s>"});
        ChatTemplate::with_clock(
            source,
            special.as_object().expect("an object"),
            Arc::new(|f: &str| format!("<{f}>")),
        )
        .expect("it compiles")
    }

    fn conversation() -> Conversation {
        Conversation {
            messages: vec![json!({"role": "user", "content": " Hi & <bye>\n"})],
            ..Conversation::default()
        }
    }

    #[test]
    fn helpers_of_real_templates_are_there() {
        let source = "{{ bos_token }}{{ strftime_now('%d %b') }}{% for m in messages %}{% if m.content.strip().startswith('Hi') %}\
                      {{ m['content'].strip() | tojson }}{% endif %}{{ messages[0:1] | length }}{% endfor %}";
        let got = template(source)
            .render(&conversation())
            .expect("it renders");
        assert_eq!(got, "<s><%d %b>\"Hi & <bye>\"1");
    }

    #[test]
    fn generation_marks_are_transparent() {
        let source = "a\n{%- generation -%}\n b {{ bos_token }}\n{%- endgeneration -%}\n c";
        assert_eq!(
            template(source)
                .render(&conversation())
                .expect("it renders"),
            "ab <s>c"
        );
    }

    #[test]
    fn a_refusal_is_in_the_templates_own_words() {
        let error = template("{{ raise_exception('Roles must alternate') }}")
            .render(&conversation())
            .unwrap_err();
        assert!(
            error.to_string().contains("Roles must alternate"),
            "{error}"
        );
    }

    #[test]
    fn a_template_that_does_not_end_is_stopped() {
        let source =
            "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}";
        assert!(matches!(
            template(source).render(&conversation()),
            Err(TemplateError::Render(_))
        ));
    }

    #[test]
    fn lists_are_added_up_one_behind_the_other() {
        for (source, expected) in [
            ("{{ ([[1]] * 100000) | sum(start=[]) | length }}", "100000"),
            (
                "{{ [{'a': [1]}, {'a': [2, 3]}] | sum('a', [0]) | join(' ') }}",
                "0 1 2 3",
            ),
            ("{{ [{'a': 1}, {'a': 2}] | sum(attribute='a') }}", "3"),
        ] {
            let got = template(source).render(&conversation());
            assert_eq!(got.expect("it renders"), expected);
        }
    }

    #[test]
    fn only_numbers_in_a_field_are_widths() {
        for (source, expected) in [
            ("{{ '%s 9999999999' % 'x' }}", "x 9999999999"),
            ("{{ '%%9999999999 %3s' % 'x' }}", "%9999999999   x"),
            ("{{ '%(9999999999)s' % {'9999999999': 'x'} }}", "x"),
            (
                "{{ '{} 9999999999: {:>3}'.format('x', 'y') }}",
                "x 9999999999:   y",
            ),
            ("{{ '{{:9999999999}} {}'.format('x') }}", "{:9999999999} x"),
        ] {
            let got = template(source).render(&conversation());
            assert_eq!(got.expect("it renders"), expected);
        }
        for (source, narrow) in [
            ("{{ '%%%-WIDTHs|' % 'x' }}", "%x    |"),
            ("{{ '%(a%s)-WIDTHs|' % {'a%s': 'x'} }}", "x    |"),
            ("{{ '%s %.WIDTHf' % (1, 1.5) }}", "1 1.50000"),
            ("{{ '{{{:WIDTH}|'.format('x') }}", "{x    |"),
            ("{{ '{:}<WIDTH}|'.format('x') }}", "x}}}}|"),
            ("{{ '{:<WIDTH}|'.format('x') }}", "x    |"),
            ("{{ '{0[}:]:{>WIDTH}'.format({'}:': 'x'}) }}", "{{{{x"),
            ("{{ '{} {:+#0,.WIDTHf}'.format(1, 1.5) }}", "1 +1.50000"),
        ] {
            let of =
                |width: &str| template(&source.replace("WIDTH", width)).render(&conversation());
            assert_eq!(of("5").expect("it renders"), narrow, "{source}");
            let error = of("999999999999").unwrap_err();
            assert!(error.to_string().contains("fuel"), "{source}: {error}");
        }
    }

    #[test]
    fn a_rendering_makes_at_most_256_mb() {
        let of = |texts: u64| {
            let source = format!(
                "{{% set ns = namespace(all=[]) %}}{{% for i in range({texts}) %}}\
                 {{% set ns.all = ns.all + [('x' ~ i % 10) * 5000000] %}}{{% endfor %}}{{{{ ns.all | length }}}}"
            );
            template(&source).render(&conversation())
        };
        assert_eq!(of(25).expect("it renders"), "25");
        let error = of(26).unwrap_err();
        assert!(error.to_string().contains("fuel"), "{error}");
    }

    #[test]
    fn a_template_cannot_exhaust_memory() {
        // A few words that mean terabytes.
        let much = "(['x' * 50000000] * 100000)";
        for source in [
            "{{ '%999999999999s' % 'x' }}".to_owned(),
            "{{ '%.999999999999d' % 1 }}".to_owned(),
            "{{ '%99999999999999999999999s' % 'x' }}".to_owned(),
            format!("{{{{ '%s' % {much} }}}}"),
            "{{ ('%(a)s' * 1000000) | format(a='x' * 50000000) }}".to_owned(),
            "{{ '{:>999999999999}'.format('x') }}".to_owned(),
            "{{ ('{0}' * 1000000).format('x' * 50000000) }}".to_owned(),
            format!("{{{{ '{{}}'.format({much}) }}}}"),
            format!("{{{{ ''.join({much}) }}}}"),
            "{{ ('x' * 50000000).join(range(100000) | map('string') | list) }}".to_owned(),
            format!("{{{{ {much} | join }}}}"),
            "{{ range(100000) | join('x' * 50000000) }}".to_owned(),
            format!("{{{{ {much} | tojson }}}}"),
            "{{ ([1] * 100000) | tojson(indent='x' * 50000000) }}".to_owned(),
            "{{ ([1] * 100000) | tojson(separators=('x' * 50000000, '')) }}".to_owned(),
            "{{ (['\\u0001' * 100000000] * 2) | tojson }}".to_owned(),
            "{{ [('x,' * 50000000).split(',')] }}".to_owned(),
            "{{ [('x,' * 50000000).rsplit(',')] }}".to_owned(),
            "{{ [('x ' * 50000000).split()] }}".to_owned(),
            "{{ [('x ' * 50000000).rsplit()] }}".to_owned(),
            "{{ [('x\\n' * 50000000).splitlines()] }}".to_owned(),
            "{% set x = 'x' * 50000000 %}{% set ns = namespace(all=[]) %}\
             {% for i in range(10000) %}{% set ns.all = ns.all + [x.partition('y')] %}{% endfor %}"
                .to_owned(),
            format!("{{{{ {much} | string }}}}"),
            format!("{{{{ {much} | upper }}}}"),
            format!("{{{{ {much} | pprint }}}}"),
            format!("{{{{ {much} ~ 'x' }}}}"),
            format!("{{{{ 'x' ~ {much} * 2 ~ 'y' }}}}"),
            format!("{{{{ {much} | indent }}}}"),
            "{{ ('\\n' * 50000000) | indent(999999999) }}".to_owned(),
            format!("{{{{ {much} | replace('x', 'y') }}}}"),
            format!("{{{{ 'x' | replace('x', {much}, 1) }}}}"),
            "{{ ('x' * 50000000) | replace('x', 'y' * 50000000, count=9999999) }}".to_owned(),
            format!("{{{{ {much} }}}}"),
            format!("{{{{ [{much}] }}}}"),
            format!("{{{{ {much} | safe }}}}"),
            format!("{{{{ ['x'] | select({much}) }}}}"),
            format!("{{{{ ['x'] | join(attribute={much}) }}}}"),
            format!("{{{{ 'x'.split({much}) }}}}"),
            format!("{{{{ {much} | sum(start='') }}}}"),
            format!("{{{{ [{much}] | sum(start=[]) }}}}"),
            format!("{{{{ {much} | trim }}}}"),
            format!("{{{{ {much} | escape }}}}"),
            format!("{{{{ [1].index({much}) }}}}"),
            format!("{{{{ raise_exception({much}) }}}}"),
        ] {
            let error = template(&source).render(&conversation()).unwrap_err();
            assert!(matches!(error, TemplateError::Render(_)), "{error}");
        }
    }

    #[test]
    fn a_template_cannot_overflow_the_stack() {
        let grow = |value: &str| {
            format!(
                "{{% set ns = namespace(x=[]) %}}{{% set c = cycler(1) %}}\
                 {{% for i in range(50000) %}}{{% set ns.x = {value} %}}{{% endfor %}}{{{{ ns.x }}}}"
            )
        };
        for source in [
            grow("[ns.x]"),
            grow("{'a': ns.x}"),
            grow("[ns.x][0:]"),
            grow("[ns.x] | map('list')"),
            grow("namespace(x=ns.x)"),
            grow("ns"),
            grow("[ns]"),
            grow("cycler(ns.x)"),
            grow("loop"),
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".to_owned(),
            "{% set x = [x] %}".repeat(50_000) + "{{ x }}",
        ] {
            let error = template(&source).render(&conversation()).unwrap_err();
            assert!(matches!(error, TemplateError::Render(_)), "{error}");
        }
        for source in [
            format!("{{{{ {}1{} }}}}", "[".repeat(50_000), "]".repeat(50_000)),
            format!("{{{{ {}1 }}}}", "-".repeat(50_000)),
            format!("{{{{ {}", "-".repeat(50_000)),
            "{% if true %}".repeat(50_000),
            format!(
                "{{% if true %}}{}{{% endif %}}",
                "{% elif true %}".repeat(50_000)
            ),
            format!("{{{{ 1{} }}}}", "+1".repeat(50_000)),
        ] {
            let error = ChatTemplate::new(&source, &serde_json::Map::new()).unwrap_err();
            assert!(matches!(error, TemplateError::Compile(_)), "{error}");
        }
    }

    #[test]
    fn what_is_kept_does_not_remember_what_it_was_made_of() {
        for (start, next, length) in [
            ("range(3)", "ns.x[0:]", "3"),
            ("[1, 2, 3]", "ns.x * 1", "3"),
            ("[1, 2, 3]", "ns.x | reverse", "3"),
            ("[[1, 2, 3]]", "[ns.x[0][0:]]", "1"),
            ("{'a': [1, 2, 3]}", "{'a': ns.x.a[0:]}", "1"),
        ] {
            let source = format!(
                "{{% set ns = namespace(x={start}) %}}{{% for i in range(9999) %}}\
                 {{% set ns.x = {next} %}}{{% endfor %}}{{{{ ns.x | length }}}}"
            );
            let got = template(&source).render(&conversation());
            assert_eq!(got.expect("it renders"), length, "{source}");
        }
        let source = "{% set x = ((1, [2][0:]), {'a': range(5)[1:3]}) %}\
                      {{ x[0][1][0] }}{{ x[1].a[-1] }}{{ x[1].a is sequence }}{{ x[0] }}";
        let got = template(source).render(&conversation());
        assert_eq!(got.expect("it renders"), "22True(1, [2])");
    }

    #[test]
    fn comparisons_end() {
        let endless = |inside: &str| format!("[[[[{inside}] * 9999] * 9999] * 9999]");
        let (x, y) = (endless("1"), endless("1"));
        let grow = |compare: &str| {
            format!(
                "{{% macro f(x, y, n) %}}{{% if n %}}{{{{ f([x, x], [y, y], n - 1) }}}}\
                 {{% else %}}{{{{ {compare} }}}}{{% endif %}}{{% endmacro %}}{{{{ f([1], [1], 45) }}}}"
            )
        };
        for source in [
            format!("{{{{ {x} == {y} }}}}"),
            format!("{{{{ 1 < 2 == ({x} != {y}) }}}}"),
            format!("{{% for i in [1] if {x} <= {y} %}}{{% endfor %}}"),
            format!("{{{{ {x} in [{y}] }}}}"),
            format!("{{{{ {x} not in [{y}] }}}}"),
            format!("{{{{ {x} in 'x' }}}}"),
            format!("{{% set x = {{{x}: 1}} %}}x"),
            format!("{{% set x = {{({x},): 1}} %}}x"),
            format!("{{{{ {{'a': 1, 'b': 2}}[{x}] }}}}"),
            format!("{{{{ {{'a': 1, 'b': 2}}.get({x}) }}}}"),
            format!("{{{{ {{'a': 1, 'b': 2}} | attr({x}) }}}}"),
            format!("{{{{ [{x}].index({y}) }}}}"),
            format!("{{{{ [{x}].count({y}) }}}}"),
            format!("{{{{ [{x}] | select('eq', {y}) | list | length }}}}"),
            format!("{{{{ {x} is eq({y}) }}}}"),
            format!("{{{{ {x} is in([{y}]) }}}}"),
            format!("{{{{ [{x}, {y}] | sort | length }}}}"),
            format!("{{{{ [{x}, {y}] | unique | length }}}}"),
            format!("{{{{ [{x}, {y}] | min | length }}}}"),
            format!("{{{{ [[{x}, {y}]] | map('max') | list | length }}}}"),
            format!("{{{{ [{{'a': {x}}}, {{'a': {y}}}] | groupby('a') | length }}}}"),
            format!("{{{{ {{'a': {x}, 'b': {y}}} | dictsort(by='value') | length }}}}"),
            format!("{{% for i in [{x}, {y}] %}}{{{{ loop.changed(i) }}}}{{% endfor %}}"),
            grow("x == y"),
            grow("x in [y]"),
            grow("x is ge y"),
            "{% set x = 'x' * 50000000 %}{% set y = 'x' * 50000000 %}\
             {% for i in range(99999) %}{{ x == y }}{{ x is eq y }}{% endfor %}"
                .to_owned(),
            format!("{{{{ ({}) | tojson }}}}", &x[1..x.len() - 1]),
        ] {
            let error = template(&source).render(&conversation()).unwrap_err();
            assert!(matches!(error, TemplateError::Render(_)), "{error}");
        }
    }

    #[test]
    fn an_error_is_a_short_text() {
        let error = template("{{ raise_exception('ü' * 1000000) }}")
            .render(&conversation())
            .unwrap_err()
            .to_string();
        assert!(error.contains("üü…"), "{error}");
        assert!(error.chars().count() < 1200, "{error}");
    }

    #[test]
    fn what_is_not_jinja_is_refused() {
        let error = ChatTemplate::new("{% if %}", &serde_json::Map::new()).unwrap_err();
        assert!(matches!(error, TemplateError::Compile(_)), "{error}");
    }
}
