"""Makes the files beside it from the published stubs: `pip install smg-grpc-proto==0.4.28`, then `python make.py`.

descriptors.bin   the published files, as one FileDescriptorSet
messages.txt      for every message type: its name and, in hexadecimal, a message with every field set (one for each member of a oneof)
"""

import pathlib

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message_factory import GetMessageClass
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2

HERE = pathlib.Path(__file__).parent
FILES = [common_pb2.DESCRIPTOR, vllm_engine_pb2.DESCRIPTOR]
# Values that differ from the default, and negative or large where the type allows it, so that a wrong type shows.
SCALARS = {
    Field.TYPE_DOUBLE: -0.1,
    Field.TYPE_FLOAT: 1.5,
    Field.TYPE_INT64: -(1 << 62) - 3,
    Field.TYPE_UINT64: (1 << 63) + 5,
    Field.TYPE_INT32: -7,
    Field.TYPE_UINT32: (1 << 31) + 9,
    Field.TYPE_BOOL: True,
    Field.TYPE_STRING: "text, é",
    Field.TYPE_BYTES: b"\x00\xff bytes",
    Field.TYPE_ENUM: 2,
}


def value(field, depth):
    return filled(field.message_type, {}, depth + 1) if field.message_type else SCALARS[field.type]


def filled(kind, choice, depth=0):
    """A message with every field set; of a oneof the member that `choice` names, or the first."""
    message = GetMessageClass(kind)()
    for field in kind.fields:
        oneof = field.containing_oneof
        chosen = choice.get(oneof.name, oneof.fields[0].name) if oneof else field.name
        if field.name != chosen or depth > 3:
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            # One entry: the order of several is nobody's.
            entry = field.message_type.fields_by_name
            key, item = SCALARS[entry["key"].type], entry["value"]
            if item.message_type:
                getattr(message, field.name)[key].CopyFrom(value(item, depth))
            else:
                getattr(message, field.name)[key] = value(item, depth)
        elif field.is_repeated and field.message_type:
            getattr(message, field.name).extend([value(field, depth), value(field, depth)])
        elif field.is_repeated:
            getattr(message, field.name).extend([value(field, depth)] * 2)
        elif field.message_type:
            getattr(message, field.name).CopyFrom(value(field, depth))
            getattr(message, field.name).SetInParent()
        else:
            setattr(message, field.name, value(field, depth))
    return message


def main():
    descriptors, lines = descriptor_pb2.FileDescriptorSet(), []
    for file in FILES:
        file.CopyToProto(descriptors.file.add())
        for kind in file.message_types_by_name.values():
            choices = [{}] + [
                {oneof.name: member.name}
                for oneof in kind.oneofs
                for member in oneof.fields[1:]
            ]
            for choice in choices:
                data = filled(kind, choice).SerializeToString(deterministic=True)
                lines.append(f"{kind.full_name} {data.hex()}\n")
    HERE.joinpath("descriptors.bin").write_bytes(descriptors.SerializeToString(deterministic=True))
    HERE.joinpath("messages.txt").write_text("".join(lines))


if __name__ == "__main__":
    main()
