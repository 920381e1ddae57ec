"""Renders the templates beside this file as transformers does and writes `expected.json`.

    pip install transformers==5.23.0 jinja2==3.1.6
    python engine/tests/templates/make.py

The clock of `strftime_now` stands at CLOCK. Where a rendering raises, the exception's type and words are recorded instead of a text.
"""

import datetime
import json
import pathlib

from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent
CLOCK = datetime.datetime(2025, 3, 7, 9, 5, 2)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


class StandingClock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return CLOCK


def render(template, conversation):
    """`{"text": …}` or `{"raises": …}`."""
    try:
        [text], _ = chat_template_utils.render_jinja_template(
            [conversation.get("messages", [])],
            tools=conversation.get("tools"),
            chat_template=template,
            add_generation_prompt=conversation.get("add_generation_prompt", False),
            **SPECIAL | conversation.get("variables", {}),
        )
    except Exception as error:  # Templates can raise anything.
        return {"raises": f"{type(error).__name__}: {error}"}
    return {"text": text}


def main():
    chat_template_utils.datetime = StandingClock
    conversations = json.loads((HERE / "conversations.json").read_text())
    idioms = json.loads((HERE / "idioms.json").read_text())
    templates = {path.name: path.read_text() for path in sorted(HERE.glob("*.jinja"))}
    expected = {
        "clock": CLOCK.isoformat(),
        "special_tokens": SPECIAL,
        "templates": {
            name: {which: render(template, conversation) for which, conversation in conversations.items()}
            for name, template in templates.items()
        },
        "idioms": [render(template, {"variables": idioms["variables"]}) for template in idioms["templates"]],
    }
    text = json.dumps(expected, ensure_ascii=False, indent=1)
    (HERE / "expected.json").write_text(text + "\n")
    raised = text.count('"raises"')
    print(f"{len(templates)} templates x {len(conversations)} conversations, {len(idioms['templates'])} idioms; {raised} raise")


if __name__ == "__main__":
    main()
