"""Bits per byte of language models, whatever their tokens are. Needs nothing but `evaluate`."""

import math

import datasets
import evaluate


_DESCRIPTION = """\
Bits per byte: the negative log likelihood that a language model gives to texts, in bits, over the number of bytes of
their UTF-8. Tokenizers cut texts into more or fewer tokens, so losses per token cannot be compared between them; bits
per byte can. On ASCII text it is bits per character.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: Negative log likelihoods in nats, for each text its total, or a list with that of each token.
    references: The texts, or the numbers of their bytes. Leave out of both what the model did not predict.

Returns:
    bits_per_byte: Summed predictions / ln 2 / summed bytes.
    bytes: The number of bytes.

Examples:
    >>> import math
    >>> metric = evaluate.load("bits_per_byte")  # doctest: +SKIP
    >>> metric.compute(predictions=[4 * math.log(2)], references=["text"])  # doctest: +SKIP
    {'bits_per_byte': 1.0, 'bytes': 4}
"""

_CITATION = """\
@article{shannon1951,
  title={Prediction and Entropy of Printed English},
  author={Shannon, Claude E.},
  journal={Bell System Technical Journal},
  volume={30},
  number={1},
  pages={50--64},
  year={1951}
}
"""


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Nats / bytes / ln 2.

    Args:
        nats: Summed negative log likelihood.
        num_bytes: Number of bytes of the text that was predicted.

    Raises:
        ValueError: There are no bytes.

    Example:
        >>> bits_per_byte(8 * math.log(2), 2)
        4.0
    """
    if num_bytes < 1:
        raise ValueError(f"got a text of {num_bytes} bytes: expected at least one byte.")
    return nats / num_bytes / math.log(2)


def _features(prediction, reference: str) -> datasets.Features:
    return datasets.Features({"predictions": prediction, "references": datasets.Value(reference)})


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class BitsPerByte(evaluate.Metric):
    """The module that `evaluate.load` finds."""

    def _info(self) -> evaluate.MetricInfo:
        total, by_token = datasets.Value("float64"), datasets.Sequence(datasets.Value("float64"))
        # texts first, or the text "2026" would be taken for a number of bytes
        options = [_features(prediction, kind) for kind in ("string", "int64") for prediction in (total, by_token)]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=options,
        )

    def _compute(self, predictions, references) -> dict:
        # rounded once, so the order of batches and processes does not matter
        nats = math.fsum(nll for example in predictions for nll in _as_list(example))
        if not nats >= 0:  # nan too
            raise ValueError(f"got nats={nats}: expected a sum of negative log likelihoods, which is at least 0.")
        sizes = [len(text.encode()) if isinstance(text, str) else int(text) for text in references]
        return {"bits_per_byte": bits_per_byte(nats, sum(sizes)), "bytes": sum(sizes)}


def _as_list(nats) -> list[float]:
    return nats if isinstance(nats, list) else [nats]
