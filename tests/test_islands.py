"""Tables, shares and JSON of a search, from values."""

import json

import numpy as np
import tensorflow as tf

import tfhalf
from tfhalf.islands import LayerCost, Search, Trial


def found(**changes) -> Search:
    layers = [
        LayerCost("block", np.inf, 0.5, np.inf, 300, 30, False),
        LayerCost("block/inner", np.inf, 0.5, np.inf, 100, 10, True),
        LayerCost("dense", 0.001, 0.002, 0.02, 100, 10, False),
    ]
    given = {
        "plan": tfhalf.PrecisionPlan(layers={"block/inner": "float32"}),
        "metric": "loss",
        "tolerance": 0.01,
        "gradient_tolerance": 0.22,
        "float32": Trial("loss", 1.0, True, gradient=0.0),
        "half": Trial("loss", np.nan, False),
        "with_plan": Trial("loss", 1.001, True, gradient=0.02, layer="dense", scale=2.0**15),
        "layers": layers,
        "evaluations": 5,
        "is_minimal": True,
        "seconds": {"half": 0.001, "plan": 0.002, "float32": 0.004},
    }
    return Search(**given | changes)


def test_what_islands_cost_counts_what_is_inside_once():
    assert found().islands == ["block/inner"]
    assert found().share == 100 / 400
    assert found(layers=[]).share == 0.0


def test_table_tells_all():
    lines = str(found()).splitlines()
    assert lines[0] == "float32 islands: block/inner"
    assert "in half       loss nan: not within tolerance" in lines[2]
    assert "loss 1.001, gradients differ by 0.02 (dense) at a loss scale of 2^15" in lines[3]
    assert "25.0% of the multiply-adds" in lines[6]
    assert lines[7] == "  a pass takes  1.0 ms half, 2.0 ms with the plan, 4.0 ms float32"
    assert [line.split()[:2] for line in lines if line.startswith(">")] == [[">", "block/inner"]]
    assert "didn't suffice" in str(found(is_minimal=False))
    none = found(layers=found().layers[2:], seconds={})
    assert str(none).startswith("no float32 island is needed")
    assert "with the plan" not in str(none)
    assert str(Trial("loss", np.nan, False, why="two dtypes")) == "can't be computed: two dtypes"


def test_long_tables_are_cut_and_keep_the_islands():
    layers = [LayerCost(f"layer{index}", 0.001 * index, 0.0, 0.02 * index, 1, 1, index == 0) for index in range(50)]
    lines = str(found(layers=layers)).splitlines()
    assert lines[-1] == "and 10 more"
    assert any(line.startswith("> layer0 ") for line in lines)


def test_json_and_picture():
    told = json.loads(json.dumps(found().to_json(), allow_nan=False))
    assert tfhalf.PrecisionPlan.from_json(told["plan"]) == found().plan
    assert (told["layers"][0]["forward"], told["half"]["value"]) == ("inf", "nan")
    assert told["islands"] == ["block/inner"]
    assert tf.io.decode_png(found().picture()).shape[1] > 100
