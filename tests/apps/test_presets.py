"""What --model=keras_hub:<preset> loads, and what is told where it can't."""

import keras_hub
import numpy as np
import pytest

from apps import presets, runner


def test_only_a_named_preset_is_one():
    assert presets.is_preset("keras_hub:bert_tiny_en_uncased")
    assert not any(map(presets.is_preset, ["keras_hub:", "resnet", "keras_hub", ""]))


def test_a_folder_is_loaded_with_its_weights(tmp_path):
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16, max_sequence_length=16
    )
    backbone.save_to_preset(str(tmp_path))
    loaded = presets.load(keras_hub.models.Backbone, f"keras_hub:{tmp_path}")
    for ours, theirs in zip(loaded.get_weights(), backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_cannot_be_had_is_one_line():
    with pytest.raises(
        runner.AppError, match=r"--model=keras_hub:/no/such can't be loaded: .*; it needs the web"
    ) as error:
        presets.load(keras_hub.models.Backbone, "keras_hub:/no/such")
    assert "\n" not in str(error.value)
