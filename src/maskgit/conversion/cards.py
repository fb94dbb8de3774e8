# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Model cards of converted checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..model_card import MODEL_ID, write_model_card


@dataclass(frozen=True)
class Card:
    """
    What a model card says of one converted part.

    Args:
        title (`str`): Name of the model; that of the first part is the card's heading.
        summary (`str`): One or two sentences: what it is, with links to code and paper.
        conversion (`str`): What the conversion changed, and how the result was compared with the original.
        licence (`str`): Licences of its code and weights, as a sentence.
        citation (`str`): BibTeX.
        license (`str`, *optional*): Licence of the weights by its identifier on the Hub; None if they have none.
        base_model (`str`, *optional*): Hub id of the published weights, where this is a published size.
        results (`str`, *optional*): Published results of this size with their protocol, in markdown.
        training (`str`, *optional*): What it was trained on, where that is known.
    """

    title: str
    summary: str
    conversion: str
    licence: str
    citation: str
    license: str | None = None
    base_model: str | None = None
    results: str = ""
    training: str = ""


def write_card(folder: Path, cards: Sequence[Card], model_id: str | None = None) -> None:
    """Writes the model card of a folder of converted parts: the transformer's first, if there is one."""
    results = "\n\n".join(card.results for card in cards if card.results)
    base_models = list(dict.fromkeys(card.base_model for card in cards))
    licenses = {card.license for card in cards}
    # Parts of the same project say the same.
    licences = dict.fromkeys(card.licence for card in cards)
    citations = dict.fromkeys(entry for card in cards for entry in card.citation.strip().split("\n\n"))
    sections = {
        "Results": results,
        "Training": "\n\n".join(card.training for card in cards if card.training),
        "Conversion": "\n\n".join(card.conversion for card in cards),
        "Licence": " ".join([*licences, "Python files in this folder, if any: Apache-2.0."]),
        "Citation": "```bibtex\n" + "\n".join(entry + "\n" for entry in citations) + "```",
    }
    write_model_card(
        folder,
        title=cards[0].title,
        summary=" ".join(card.summary for card in cards),
        sections=sections,
        model_id=model_id or MODEL_ID,
        license=licenses.pop() if len(licenses) == 1 else None,
        datasets=["ILSVRC/imagenet-1k"] if results else [],
        base_model=[name for name in base_models if name] if all(base_models) else [],
        metrics=["fid", "inception_score"] if results else [],
    )
