"""Which fields of quire.v1 the checks have used: every message sent and received is noted here."""

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

_fields: set[str] = set()
_values: set[tuple[str, int]] = set()


def note(message: Message) -> None:
    """Notes the fields that are set, in all of the message."""
    for field, value in message.ListFields():
        _fields.add(field.full_name)
        values = value if _is_list(field) else [value]
        if field.enum_type:
            _values.update((field.enum_type.full_name, number) for number in values)
        elif field.message_type and not field.message_type.GetOptions().map_entry:
            for inner in values:
                note(inner)


def missing(root: Descriptor) -> list[str]:
    """The fields and enum values reachable from this message that were never seen."""
    messages: dict[str, Descriptor] = {}
    enums: dict[str, EnumDescriptor] = {}
    _reach(root, messages, enums)
    fields = [field.full_name for message in messages.values() for field in message.fields]
    values = [(enum, value) for enum in enums.values() for value in enum.values if value.number != 0]
    return [name for name in fields if name not in _fields] + [
        f"{enum.full_name}.{value.name}" for enum, value in values if (enum.full_name, value.number) not in _values
    ]


def _reach(message: Descriptor, messages: dict[str, Descriptor], enums: dict[str, EnumDescriptor]) -> None:
    if message.full_name in messages or message.GetOptions().map_entry:
        return
    messages[message.full_name] = message
    for field in message.fields:
        if field.enum_type:
            enums[field.enum_type.full_name] = field.enum_type
        elif field.message_type:
            _reach(field.message_type, messages, enums)


def _is_list(field: FieldDescriptor) -> bool:
    map_entry = field.message_type and field.message_type.GetOptions().map_entry
    return field.is_repeated and not map_entry
