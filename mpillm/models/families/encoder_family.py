"""The base of families of encoders: a head of each class of transformers, with its own names."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from mpillm.errors import RecipeError
from mpillm.models.encoder import EncoderConfig
from mpillm.models.encoder_settings import Head
from mpillm.models.encoder_weights import encoder_weights
from mpillm.models.families.family import Place, TableFamily
from mpillm.models.families.hub_config import HubConfig
from mpillm.models.spec import ModelSpec

MOST_CLASSES = 1 << 20


class EncoderFamily(TableFamily):
    """A family of encoders. The head is that of the class which `architectures` names."""

    stack = "encoder"
    architectures: ClassVar[Mapping[str, Head]]
    """transformers' classes → our heads. The first one is that of a file which names none."""
    heads: ClassVar[Mapping[Head, Mapping[str, str]]]
    """Of each head: our modules, or weights, → theirs."""
    head_layers: ClassVar[Mapping[str, str]]
    """Heads → their `head_layer`, where there is one."""

    @abstractmethod
    def settings(self, hub: HubConfig, head: Head) -> dict[str, Any]:
        """Return the arguments of EncoderConfig that `hub` means, but those of all families.
        Raises RecipeError.
        """

    @abstractmethod
    def keys(self, spec: EncoderConfig) -> dict[str, Any]:
        """Return the keys of `config.json` that say what `spec` is, but those of all families."""

    def read(self, hub: HubConfig) -> EncoderConfig:
        head = self._head_of(hub)
        labelled = head in ("sequence", "token")
        if head == "span" and _labels(hub) != 2:
            raise hub.fault("num_labels", _labels(hub), "2 in a model of spans")
        return EncoderConfig(
            head=head,
            head_layer=self.head_layers.get(head, "none"),  # type: ignore[arg-type]
            classes=_labels(hub) if labelled else 0,
            **self.settings(hub, head),
        )

    def written(self, spec: ModelSpec) -> dict[str, Any]:
        assert isinstance(spec, EncoderConfig)
        labelled = {"num_labels": spec.classes} if spec.head in ("sequence", "token") else {}
        return {"architectures": [self._class_of(spec.head)], **labelled, **self.keys(spec)}

    def with_head(self, spec: ModelSpec, head: str) -> EncoderConfig:
        """Return the settings that a file of `spec` means with the class of another head.

        Raises RecipeError where the family has no such head.
        """
        assert isinstance(spec, EncoderConfig)
        named = {**self.config(spec), "architectures": [self._class_of(head)]}
        return self.read(HubConfig(named, self.defaults))

    def class_names(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        hub = HubConfig(config, self.defaults)
        if self._head_of(hub) not in ("sequence", "token"):
            return ()
        names, numbers = hub.value("id2label") or {}, range(_labels(hub))
        found = [names.get(str(number), names.get(number)) for number in numbers]
        # transformers writes LABEL_0, LABEL_1, … where a model has no names.
        named = all(isinstance(name, str) for name in found) and any(
            name != f"LABEL_{number}" for number, name in enumerate(found)
        )
        return tuple(map(str, found if named and len(set(found)) == len(found) else numbers))

    def _head_of(self, hub: HubConfig) -> Head:
        named = hub.value("architectures")
        if not named:
            return next(iter(self.architectures.values()))
        if isinstance(named, list) and named[0] in self.architectures:
            return self.architectures[named[0]]
        raise hub.fault("architectures", named, " or ".join(self.architectures))

    def _class_of(self, wanted: str) -> str:
        for name, head in self.architectures.items():
            if head == wanted:
                return name
        raise RecipeError(
            f"a model with head = {wanted!r} is none of the family {self.model_types[0]}, "
            f"which has {', '.join(dict.fromkeys(self.architectures.values()))}"
        )

    def shapes(self, spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
        assert isinstance(spec, EncoderConfig)
        return encoder_weights(spec)

    def place(self, spec: ModelSpec, name: str) -> Place:
        assert isinstance(spec, EncoderConfig)
        own = self.heads[spec.head]
        module, _, kind = name.rpartition(".")
        if name in own:
            return Place(own[name])
        if module in own:
            return Place(f"{own[module]}.{kind}")
        found = self.renamed(name)
        # The class of a bare model has no name for itself.
        return Place(found.removeprefix(self.prefix) if spec.head == "none" else found)

    def spellings(self, name: str) -> tuple[str, ...]:
        return *super().spellings(name), self.prefix + name


def name_of(table: Mapping[str, str], ours: str) -> str:
    """Return the first of their names of a value of ours; of one that they lack, the usual name."""
    return next((name for name, each in table.items() if each == ours), next(iter(table)))


def _labels(hub: HubConfig) -> int:
    """Return the number of classes: of `id2label`, or else `num_labels`."""
    names = hub.value("id2label")
    if names is None:
        return hub.integer("num_labels", most=MOST_CLASSES)
    if not isinstance(names, Mapping) or not 0 < len(names) <= MOST_CLASSES:
        raise hub.fault("id2label", names, "a mapping of numbers to names")
    return len(names)
