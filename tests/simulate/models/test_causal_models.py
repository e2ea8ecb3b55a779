"""Every causal language model of the installed transformers at a tiny size is trained and loaded again, or refused."""

from __future__ import annotations

import pytest

from tests.causal_models import TRAINED, kinds, outcome

pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.parametrize("kind", kinds())
def test_a_causal_model_is_trained_and_loaded_again_or_refused(kind: str) -> None:
    text = outcome(kind)  # raises where something else than a refusal happens
    assert text == TRAINED or "model.name" in text or "method.rank" in text
