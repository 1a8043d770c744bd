"""Classic classifiers of texts or images: LSTM, convolutions, perceptron. It needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mpillm.errors import RecipeError
from mpillm.models.block_settings import NotNegative, Positive, check_dropout
from mpillm.models.spec import ModelSpec, OutputKind, Part

if TYPE_CHECKING:
    from mpillm.models.stacks.classifier_modules import (
        CNNClassifier,
        LSTMClassifier,
        MLPClassifier,
    )


@dataclass(frozen=True)
class ClassifierSettings(ModelSpec):
    """Layers of one width between an embedding and a head of classes.

    A text is a sequence of tokens. An image is square, and a sequence of its pixels.
    """

    # The length of each row, without its padding.
    host_inputs: ClassVar[tuple[str, ...]] = ("lengths",)
    generates: ClassVar[bool] = False

    layers: Positive = 2
    width: Positive = 128
    context: Positive = 256
    """The longest text, in tokens."""
    vocab_size: NotNegative = 0
    """0: taken from the data."""
    classes: NotNegative = 0
    """0: taken from the data."""
    image_size: NotNegative = 0
    """Pixels of a side; 0: the classifier reads texts."""
    channels: Positive = 1
    """Numbers of a pixel."""
    dropout: float = 0.0
    """Probability that training sets an output of a layer to 0."""

    def __post_init__(self) -> None:
        check_dropout("dropout", self.dropout)

    @property
    def usual_task(self) -> str:
        return "image-classification" if self.image_size else "sequence-classification"

    @property
    def input_field(self) -> str:
        return "pixels" if self.image_size else "ids"

    @property
    def input_item(self) -> tuple[int, ...]:
        side = self.image_size
        return (self.channels, side, side) if side else ()

    @property
    def output_kind(self) -> OutputKind:
        return "a class of each row"

    @property
    def positions(self) -> int:
        """The positions of a sequence as it passes from layer to layer."""
        return self.image_size**2 or self.context

    @property
    def layer_weights(self) -> int:
        """The weights of one layer's products."""
        raise NotImplementedError

    @property
    def layer_biases(self) -> int:
        return self.width

    @property
    def saved_features(self) -> int:
        """The numbers that autograd saves of one position in a layer."""
        return 2 * self.width

    @property
    def working_features(self) -> int:
        """The gradients and temporary results of one position, in one layer at a time."""
        return 3 * self.width

    @property
    def embedding_weights(self) -> int:
        """The weights of the embedding: of each token, or of a pixel's numbers."""
        return self.width * ((self.channels + 1) if self.image_size else self.vocab_size)

    @property
    def blocks(self) -> int:
        return self.layers

    @property
    def stream_widths(self) -> tuple[int, ...]:
        return (self.width,)

    def streams_ahead(self, block: int, length: int = 0) -> tuple[tuple[int, int], ...]:
        # Rows are padded to one length, so `length` is the context.
        return ((self.positions, self.width),)

    @property
    def block_flops(self) -> tuple[float, ...]:
        """6 for each weight of a product and position, over the tokens of a text."""
        of_sequence = 6.0 * self.layer_weights * self.positions
        return (of_sequence / self.context,) * self.layers

    @property
    def end_flops(self) -> tuple[float, float]:
        return 0.0, 6.0 * self.width * self.classes / self.context

    def parameters_of(self, part: Part) -> int:
        total = part.count * (self.layer_weights + self.layer_biases)
        total += self.embedding_weights if self.begins(part) else 0
        return total + ((self.width + 1) * self.classes if self.ends(part) else 0)

    def activation_bytes(self, part: Part, rows: int, element_bytes: int = 4) -> int:
        # A mask of dropout has a byte for each output.
        layer = self.saved_features * element_bytes + (self.width if self.dropout else 0)
        embedded = self.width * element_bytes if self.begins(part) else 0
        return rows * self.positions * (part.count * layer + embedded)

    def working_bytes(self, rows: int, element_bytes: int = 4) -> int:
        return rows * self.positions * self.working_features * element_bytes

    def output_bytes(self, rows: int, device: str = "cpu") -> int:
        return 3 * rows * self.classes * 4

    @property
    def drops(self) -> bool:
        return self.dropout > 0

    def describe(self) -> str:
        read = f"{self.image_size} × {self.image_size} pixels of {self.channels}"
        return f"{self.layers} layers, width {self.width}, {self.classes} classes, " + (
            read if self.image_size else f"context {self.context}"
        )


@dataclass(frozen=True)
class LSTMConfig(ClassifierSettings):
    """A stack of LSTM layers (Hochreiter and Schmidhuber 1997) over the tokens of a text; the last
    real position decides.
    """

    architecture: str = "lstm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size:
            raise RecipeError(
                f"an LSTM reads texts, and image_size = {self.image_size} means images; "
                "take model.shape = cnn or mlp"
            )

    @classmethod
    def shapes(cls) -> Mapping[str, "LSTMConfig"]:
        return {"lstm": cls()}

    def build(self, part: Part | None = None) -> "LSTMClassifier":
        from mpillm.models.stacks.classifier_modules import LSTMClassifier

        return LSTMClassifier(self, part)

    @property
    def layer_weights(self) -> int:
        # Three gates and a candidate, each of the input and of the state.
        return 8 * self.width**2

    @property
    def layer_biases(self) -> int:
        return 8 * self.width

    @property
    def saved_features(self) -> int:
        # Measured on a CPU, with oneDNN's workspace of gates, cells and states.
        return 17 * self.width

    @property
    def working_features(self) -> int:
        # Gradients of the gates, and of the state.
        return 5 * self.width


@dataclass(frozen=True)
class CNNConfig(ClassifierSettings):
    """Convolutions of texts (Kim 2014) or images that keep the length; the largest value of each
    feature decides.
    """

    architecture: str = "cnn"
    kernel: Positive = 3
    """Tokens, or pixels a side, that a convolution reads."""

    @classmethod
    def shapes(cls) -> Mapping[str, "CNNConfig"]:
        return {"cnn": cls()}

    def build(self, part: Part | None = None) -> "CNNClassifier":
        from mpillm.models.stacks.classifier_modules import CNNClassifier

        return CNNClassifier(self, part)

    @property
    def layer_weights(self) -> int:
        return self.width**2 * self.kernel ** (2 if self.image_size else 1)


@dataclass(frozen=True)
class MLPConfig(ClassifierSettings):
    """Linear layers with ReLU. Of texts: a bag of tokens (Joulin et al. 2016) ahead of them."""

    architecture: str = "mlp"

    @classmethod
    def shapes(cls) -> Mapping[str, "MLPConfig"]:
        return {"mlp": cls()}

    def build(self, part: Part | None = None) -> "MLPClassifier":
        from mpillm.models.stacks.classifier_modules import MLPClassifier

        return MLPClassifier(self, part)

    @property
    def positions(self) -> int:
        return 1

    @property
    def layer_weights(self) -> int:
        return self.width**2

    @property
    def embedding_weights(self) -> int:
        pixels = self.channels * self.image_size**2
        return self.width * ((pixels + 1) if self.image_size else self.vocab_size)

    def working_bytes(self, rows: int, element_bytes: int = 4) -> int:
        # A text's embeddings, and those without padding, live until they are added up.
        texts = 0 if self.image_size else 2 * rows * self.context * self.width * element_bytes
        return texts + super().working_bytes(rows, element_bytes)
