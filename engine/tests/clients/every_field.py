"""Last of all: nothing in quire.v1 went unused. A field added to the .proto fails here until a check uses it."""

import seen
from stubs import pb

SERVICE = pb.DESCRIPTOR.services_by_name["Generation"]


def every_field_of_every_request_was_sent_by_some_check() -> None:
    _none_missing({method.input_type for method in SERVICE.methods}, "never sent")


def every_field_of_every_response_was_received_by_some_check() -> None:
    _none_missing({method.output_type for method in SERVICE.methods}, "never received")


def _none_missing(messages, what: str) -> None:
    fields = sorted({field for message in messages for field in seen.missing(message)})
    if fields:
        raise AssertionError(f"{what}: {', '.join(fields)}")
