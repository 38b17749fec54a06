"""What the Hub accepts at the head of a model card."""

import json
import math
import re
from collections.abc import Iterable, Mapping

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from .record import as_list


TASKS = {
    "CausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "ImageClassification": "image-classification",
}


AUTO_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
}


# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
    mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
    """.split()
)


def check_metadata(data: Mapping) -> None:
    """Refuse front matter that the Hub would refuse or misread, without contacting the Hub.

    Raises:
        ValueError: Names the field, what it got and what was expected.

    Example:
        >>> check_metadata({"license": "apache-2.0", "tags": ["rezero"]})
        >>> check_metadata({"license": "Apache"})
        Traceback (most recent call last):
        ...
        ValueError: license: got 'Apache', expected a licence of the Hub's list, such as apache-2.0 or other.
    """
    problems = list(_problems(data))
    if problems:
        raise ValueError(" ".join(problems))
    again = yaml.safe_load(ModelCardData(**data).to_yaml())
    if again != json.loads(json.dumps(again)) or again.get("model-index") != data.get("model-index"):
        raise ValueError(
            "the metadata change when they are written as YAML and read again: use plain texts, numbers and lists."
        )


def _problems(data: Mapping) -> Iterable[str]:
    for name in as_list(data.get("license")):
        if name not in LICENSES:
            yield f"license: got {name!r}, expected a licence of the Hub's list, such as apache-2.0 or other."
    if data.get("license") == "other" and not {"license_name", "license_link"} <= data.keys():
        yield "license: got 'other', expected license_name and license_link beside it."
    for code in as_list(data.get("language")):
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual", code):
            yield f"language: got {code!r}, expected an ISO 639 code."
    for field in ("datasets", "base_model"):
        for name in as_list(data.get(field)):
            if not re.fullmatch(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", name):
                yield f"{field}: got {name!r}, expected a name on the Hub."
    if data.get("pipeline_tag") not in (None, *AUTO_CLASSES):
        yield f"pipeline_tag: got {data['pipeline_tag']!r}, expected one of {', '.join(AUTO_CLASSES)}."
    if not all(isinstance(tag, str) and tag for tag in data.get("tags", [])):
        yield f"tags: got {data['tags']!r}, expected non-empty texts."
    yield from _problems_of_index(data.get("model-index"))


def _problems_of_index(index) -> Iterable[str]:
    if index is None:
        return
    if not isinstance(index, list) or not all(model.get("name") and model.get("results") for model in index):
        yield "model-index: expected a list of models, each with a name and results."
        return
    for result in (result for model in index for result in model["results"]):
        if not result.get("task", {}).get("type"):
            yield "model-index: a result has no task.type."
        if not all(isinstance(result.get("dataset", {}).get(key), str) for key in ("name", "type")):
            yield "model-index: a result has no dataset.name or no dataset.type."
        for metric in result.get("metrics") or [{}]:
            yield from _problems_of_metric(metric)
    if not any(_problems_of_metric(metric) for model in index for r in model["results"] for metric in r["metrics"]):
        model_index_to_eval_results(index)


def _problems_of_metric(metric: Mapping) -> Iterable[str]:
    value = metric.get("value")
    if not metric.get("type") or not isinstance(value, (int, float)) or not math.isfinite(value):
        yield f"model-index: got the metric {dict(metric)}, expected a type and a finite value."
    if "verified" in metric or "verifyToken" in metric:
        yield "model-index: got verified, which only the Hub may set: leave it out."
