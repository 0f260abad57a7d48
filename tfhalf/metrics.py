"""A metric of a model on held-out batches, as the model computes now: in half, with a plan, or in float32.

The forward pass is a graph that is made anew each time, since policies may have changed; what a Keras metric or a
function makes of it is computed outside of the graph. Masks that layers put on outputs reach the loss, not the metric.
"""

from collections.abc import Callable, Iterable

import keras
import numpy as np
import tensorflow as tf

from tfhalf import precision, taps, twins

Metric = str | keras.metrics.Metric | Callable


def in_float32(model: keras.Model, data: Iterable, metric: Metric) -> float:
    """Returns a model's metric in float32, from which a tolerance can be told.

    Args:
        model, data, metric: as in `tfhalf.search_precision`.
    """
    score = Score(model, [twins.tensors(batch) for batch in data], metric)
    with twins.without_randomness(model), precision.computing_in(model, "float32"):
        return score()


class Score:
    """A metric of a model, over all batches, as the model computes when it is asked.

    Args:
        model: built; compiled, where the metric is one of its own.
        batches: held-out tensors, as `twins.tensors` gives them.
        metric: "loss", or the name of another compiled metric; a Keras metric; a function of (y, y_pred) of a batch.

    Attributes:
        name: of the metric.

    Raises:
        ValueError: a compiled metric is named, and the model isn't compiled.
    """

    def __init__(self, model: keras.Model, batches: list, metric: Metric):
        self._model, self._batches, self._metric = model, batches, metric
        self.name = metric if isinstance(metric, str) else getattr(metric, "name", None) or metric.__name__
        if isinstance(metric, str) and not getattr(model, "compiled", False):
            raise ValueError(f"search_precision: metric is {metric!r}, but the model isn't compiled: give a function")
        self._sizes = [keras.tree.flatten(batch)[0].shape[0] for batch in batches]

    def __call__(self) -> float:
        """Runs the model over the batches, and returns the metric."""
        forward = twins.traced(self._forward, self._batches)
        found, metric = [], self._metric
        if isinstance(metric, keras.metrics.Metric):
            metric.reset_state()
        elif isinstance(metric, str):
            self._model.reset_metrics()
        for batch in self._batches:
            y_pred, loss = forward(batch)
            found.append(self._value(batch, y_pred, loss))
        value = found[-1] if isinstance(metric, keras.metrics.Metric) or self._is_compiled else None
        return float(np.average(found, weights=self._sizes) if value is None else value)

    @property
    def _is_compiled(self) -> bool:
        return isinstance(self._metric, str) and self._metric != "loss"

    def _value(self, batch, y_pred, loss) -> float:
        """Of a batch; of a metric that keeps count, of all batches so far."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        if isinstance(self._metric, keras.metrics.Metric):
            self._metric.update_state(y, y_pred, sample_weight=sample_weight)
            return float(np.mean(self._metric.result()))
        if not isinstance(self._metric, str):
            return float(np.mean(self._metric(y, y_pred)))
        if not self._is_compiled:
            return float(loss)
        self._model.compute_metrics(x, y, y_pred, sample_weight)
        results = self._model.get_metrics_result()
        if self._metric not in results:
            raise ValueError(f"search_precision: metric {self._metric!r} is none of the compiled: {', '.join(results)}")
        return float(np.mean(results[self._metric]))

    def _forward(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with keras.StatelessScope(collect_losses=True):
            y_pred = taps.inferred(self._model, x)
            if self._metric != "loss":
                return y_pred, tf.zeros([])
            loss = self._model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=False)
            return y_pred, precision.at_least_float32(tf.convert_to_tensor(loss))
