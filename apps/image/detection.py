"""Object detection: what is where in the picture?

    python -m apps.image.detection --dataset=deepforest
    python -m apps.image.detection --dataset=composites --augment=flip --image_size=256 --windows=1
    python -m apps.image.detection --dataset=voc --augment=flip --depth=34 --width=64 --image_size=512 --windows=1

Expected of the first: AP50 0.376 on another site than the one it was trained on, after 45 minutes on 2 cores with other
programs beside it (2026-11-25; RESULTS.md has the learning curve).

A detector without anchors: FCOS, Tian et al. 2019, "FCOS: Fully convolutional one-stage object detection",
arXiv:1904.01355, on a ResNet (He et al. 2016) with a feature pyramid (Lin et al. 2017, arXiv:1612.03144). KerasHub's
RetinaNet has anchors, whose sizes would have to be chosen for each data set. Losses: focal (Lin et al. 2017,
arXiv:1708.02002), generalised IoU, cross-entropy of the centerness; all in float32.

A crowd or a difficult object of coco or voc counts as any other, so that scores there aren't quite the official ones.

It trains on windows and is served on whole pictures. Suppressing overlapping boxes is a part of the exported graph.
"""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import flags
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from apps import figures, runner, sets
from apps.image import boxes as box_math
from apps.image import pictures as images
from apps.image import resnet

STRIDES = (8, 16, 32)
# The longest distance from a place to an edge of its box, level by level (FCOS, section 3.2).
_RANGES = ((8, 64.0), (16, 128.0), (32, np.inf))
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
# Losses are divided by a constant and not by a batch's number of objects, which would differ on each replica.
_TYPICAL_PLACES = 64
_BOX_WEIGHT = 2.0
_ALPHA, _GAMMA = 0.25, 2.0
_PRIOR = 0.01
# Training keeps an object of which a quarter is in the window, as the tiles of deepforest do.
_VISIBLE = 0.25
_LONGEST = 1536
_DETECTIONS, _LOWEST_SCORE, _OVERLAP = 100, 0.05, 0.5
_SHOWN, _SHOWN_SCORE = 6, 0.5
_LOOKED_AT = 20  # test pictures, to see whether any has a box


# Flags


def define_flags(values: flags.FlagValues) -> None:
    """Defines what this task adds to the shared flags."""
    images.define_flags(values, image_size=256, windows=16, multiple="32", changes="zoom and colours")
    here = {"flag_values": values}
    flags.DEFINE_enum("depth", "18", [str(depth) for depth in _BLOCKS], "Layers of the ResNet.", **here)
    flags.DEFINE_integer(
        "width", 32, "Channels of the ResNet's first stage, a multiple of 8, 8 to 256.", 8, 256, **here
    )
    decay_help = "AdamW's decay, per step and unit of learning rate, 0 to 1."
    flags.DEFINE_float("weight_decay", 0.05, decay_help, 0.0, 1.0, **here)


# Model


def build_model(options, data: runner.Data) -> keras.Model:
    """Pictures (float32, 0 to 255, sides a multiple of 32) to float32 `[batch, places, classes + 5]`.

    For each place: a logit for each class, the distances to the box's edges in pixels, and the logit of the centerness.
    """
    channels, num_classes = data.about["channels"], len(data.about["class_names"])
    pictures = keras.Input([None, None, channels], name="picture")
    # Scaled to [-1, 1] in float32: half has 11 bits, and a picture's 8 shall all arrive.
    x = keras.layers.Rescaling(1 / 127.5, offset=-1.0, dtype="float32", name="scale")(pictures)
    levels = _pyramid(_backbone(x, options.width, int(options.depth)), 2 * options.width)
    return keras.Model(pictures, _head(levels, 2 * options.width, num_classes), name="detector")


def _backbone(x, width: int, depth: int) -> list:
    """ResNet's last three stages, with strides 8, 16 and 32."""
    x = resnet.conv_norm(x, width, 7, 2, "stem")
    x = keras.layers.ReLU(name="stem_relu")(x)
    x = keras.layers.MaxPooling2D(3, 2, padding="same", name="stem_pool")(x)
    stages = []
    for stage, blocks in enumerate(_BLOCKS[depth]):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            x = resnet.residual_block(x, width * 2**stage, stride, f"stage{stage + 1}_block{block + 1}")
        stages.append(x)
    return stages[1:]


def _pyramid(stages: list, filters: int) -> list:
    """Feature pyramid: each level gets what the coarser ones know."""
    levels, above = [], None
    for stride, x in zip(reversed(STRIDES), reversed(stages), strict=True):
        x = keras.layers.Conv2D(filters, 1, name=f"lateral{stride}")(x)
        if above is not None:
            above = keras.layers.UpSampling2D(2, name=f"up{stride}")(above)
            x = keras.layers.Add(name=f"merge{stride}")([x, above])
        above = x
        levels.insert(0, keras.layers.Conv2D(filters, 3, padding="same", name=f"level{stride}")(x))
    return levels


def _head(levels: list, filters: int, num_classes: int):
    """The same few layers on every level; GroupNormalization, since levels differ in their statistics."""
    towers = {
        name: [
            layer
            for index in (1, 2)
            for layer in (
                keras.layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"{name}{index}_conv"),
                keras.layers.GroupNormalization(filters // 8, name=f"{name}{index}_norm"),
                keras.layers.ReLU(name=f"{name}{index}_relu"),
            )
        ]
        for name in ("class", "box")
    }
    rare = keras.initializers.Constant(-np.log((1 - _PRIOR) / _PRIOR))  # focal loss: nearly every place is background

    def output(size: int, name: str, **settings):
        return keras.layers.Conv2D(size, 3, padding="same", dtype="float32", name=name, **settings)

    classify = output(num_classes, "class_logits", bias_initializer=rare)
    measure = output(4, "box_strides", activation="softplus")
    centre = output(1, "centerness_logit")
    rows = []
    for stride, level in zip(STRIDES, levels, strict=True):
        about = dict.fromkeys(towers, level)
        for name, tower in towers.items():
            for layer in tower:
                about[name] = layer(about[name])
        edges = keras.layers.Rescaling(float(stride), dtype="float32", name=f"edges{stride}")(measure(about["box"]))
        parts = [classify(about["class"]), edges, centre(about["box"])]
        row = keras.layers.Concatenate(dtype="float32", name=f"row{stride}")(parts)
        rows.append(keras.layers.Reshape([-1, num_classes + 5], dtype="float32", name=f"places{stride}")(row))
    return keras.layers.Concatenate(axis=1, dtype="float32", name="places")(rows)


def build_optimizer(options, num_steps: int) -> keras.optimizers.Optimizer:
    """AdamW with warm-up and cosine decay."""
    return runner.adamw(options.learning_rate, num_steps, options.weight_decay)


@keras.saving.register_keras_serializable("tfhalf.apps")
class DetectionLoss(keras.losses.Loss):
    """Focal loss of all places; generalised IoU and centerness where there is an object.

    Targets: float32 `[batch, places, 5]` as `boxes.assign` gives them; outputs: as `build_model` says.
    """

    def call(self, y_true, y_pred):
        """Returns float32 `[batch]`."""
        logits, edges, centre = y_pred[..., :-5], y_pred[..., -5:-1], y_pred[..., -1]
        labels, true_edges = tf.cast(y_true[..., 0], tf.int32), y_true[..., 1:]
        positive = tf.cast(labels >= 0, tf.float32)
        focal = _focal(tf.one_hot(labels, tf.shape(logits)[-1]), logits)
        true_centre = box_math.centerness(true_edges)
        # Centres count more (FCOS); an object smaller than a cell has no place inside, and shall count too.
        weights = positive * tf.maximum(true_centre, 0.1)
        origin = tf.zeros_like(edges[..., :2])
        overlap = box_math.giou(box_math.from_distances(true_edges, origin), box_math.from_distances(edges, origin))
        cross = tf.nn.sigmoid_cross_entropy_with_logits(true_centre, centre)
        losses = (focal, _BOX_WEIGHT * weights * (1 - overlap), positive * cross)
        return sum(tf.reduce_sum(loss, axis=-1) for loss in losses) / _TYPICAL_PLACES


def _focal(targets, logits):
    """Focal loss summed over classes, float32 `[batch, places]`."""
    cross = tf.nn.sigmoid_cross_entropy_with_logits(targets, logits)
    probability = tf.sigmoid(logits)
    missed = targets * (1 - probability) + (1 - targets) * probability
    weights = targets * _ALPHA + (1 - targets) * (1 - _ALPHA)
    return tf.reduce_sum(weights * missed**_GAMMA * cross, axis=-1)


def build_loss(options) -> keras.losses.Loss:
    """Focal, IoU and centerness."""
    return DetectionLoss(name="detection_loss")


@keras.saving.register_keras_serializable("tfhalf.apps")
class PlacePrecision(keras.metrics.AUC):
    """Area under the precision-recall curve of the places: how well those that answer for an object rank above others.

    It is there to be looked at while training: COCO's metrics need whole pictures.
    """

    def __init__(self, name: str = "place_precision", dtype: str = "float32"):
        super().__init__(curve="PR", name=name, dtype=dtype)

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds a batch of targets and outputs as `DetectionLoss` takes them."""
        labels, logits = tf.cast(y_true[..., 0], tf.int32), y_pred[..., :-5]
        return super().update_state(tf.one_hot(labels, tf.shape(logits)[-1]), tf.sigmoid(logits))

    def get_config(self):
        """Returns what `__init__` takes."""
        return {"name": self.name, "dtype": self.dtype}


def build_metrics(options) -> list[keras.metrics.Metric]:
    """How places are ranked; average precision of boxes needs whole pictures."""
    return [PlacePrecision()]


# Data


def load_data(options) -> runner.Data:
    """Reads any TFDS set with pictures, boxes and classes."""
    _check_options(options)
    features = sets.require_features(options, "object detection", {"image": "Image", "objects": "Sequence"})
    kinds = {name: type(feature).__name__ for name, feature in dict(features["objects"].feature).items()}
    if kinds.get("bbox") != "BBoxFeature" or kinds.get("label") != "ClassLabel":
        listing = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise runner.AppError(
            f"--dataset={options.dataset}: its objects have {listing}; object detection needs bbox (BBoxFeature) and "
            "label (ClassLabel)"
        )
    builder = sets.prepare(options)
    train, validation, test = _splits(builder)
    channels = 1 if features["image"].shape[-1] in (1, 2) else 3

    def make(example, seed, augment=options.augment):
        return _window(example, seed, options.image_size, channels, augment)

    def whole(example):
        truth = {"boxes": _true_boxes(example), "class_ids": example["objects"]["label"]}
        return {"image": images.to_channels(example["image"], channels)}, truth

    batches, steps = images.training_windows(*images.read(builder, train), options, make)
    held_out = images.read(builder, validation)[0]
    return runner.Data(
        train=batches,
        steps_per_epoch=steps,
        validation=images.validation_windows(held_out, options, lambda *args: make(*args, augment="none")),
        # Pictures differ in size, and in their number of objects: one at a time.
        test=images.read(builder, test)[0].map(whole).batch(1).prefetch(tf.data.AUTOTUNE),
        about={"class_names": features["objects"]["label"].names, "channels": channels},
        shown=held_out.take(_SHOWN).map(whole).batch(1),
    )


def _splits(builder) -> tuple[str, str, str]:
    """Train, validation and test; coco keeps the boxes of its test part to itself."""
    splits = sets.split_names(builder)
    if splits[2] == "test" and "validation" in builder.info.splits:
        first = builder.as_dataset(split="test", shuffle_files=False).take(_LOOKED_AT)
        if not any(len(example["objects"]["bbox"]) for example in first):
            runner.say("the test part has no boxes: the validation part is the test, a tenth of train the validation")
            return "train[:90%]", "train[90%:]", "validation"
    return splits


def _check_options(options) -> None:
    for name, multiple in (("image_size", STRIDES[-1]), ("width", 8)):
        value = getattr(options, name)
        if value % multiple:
            raise runner.AppError(f"--{name}={value} must be a multiple of {multiple}")


def _true_boxes(example) -> tf.Tensor:
    """The objects' boxes in pixels; TFDS gives shares of height and width."""
    return example["objects"]["bbox"] * tf.cast(tf.tile(tf.shape(example["image"])[:2], [2]), tf.float32)


def _window(example, seed, size: int, channels: int, augment: str):
    """A window of a picture, and what each place of the detector shall say of it."""
    seeds = tf.random.split(seed, 2)
    picture = images.to_channels(example["image"], channels)
    window = images.draw_window(tf.shape(picture)[:2], size, augment, seeds[0])
    moved = images.move_boxes(_true_boxes(example), window)
    clipped = tf.clip_by_value(moved, 0.0, float(size))
    area, whole = (tf.reduce_prod(tf.maximum(b[:, 2:] - b[:, :2], 0.0), axis=-1) for b in (clipped, moved))
    seen = (area > 0) & (area >= _VISIBLE * whole)
    cut = images.cut(picture, window, "bilinear")
    if augment != "none":
        cut = images.change_colours(cut, seeds[1])
    labels = tf.boolean_mask(example["objects"]["label"], seen)
    points, steps = box_math.places(size, size, STRIDES)
    return cut, box_math.assign(tf.boolean_mask(clipped, seen), labels, points, steps, _RANGES)


# What is served, how it is scored and shown


def serve(model: keras.Model, data: runner.Data):
    """Pictures of any size to a box and scores for each place; `decide` makes detections of them."""

    def detect(image):
        pictures = images.to_channels(image, data.about["channels"])
        pictures, filled = images.shrink_and_pad(pictures, _LONGEST, STRIDES[-1])
        points, _ = box_math.places(tf.shape(pictures)[1], tf.shape(pictures)[2], STRIDES)
        rows = model(pictures, training=False)
        # FCOS: a place at the edge of an object knows less of its box.
        scores = tf.sqrt(tf.sigmoid(rows[..., :-5]) * tf.sigmoid(rows[..., -1:]))
        inside = tf.reduce_all(points < tf.cast(filled, tf.float32), axis=-1)
        edges = tf.cast(tf.tile(filled, [2]), tf.float32)
        found = tf.clip_by_value(box_math.from_distances(rows[..., -5:-1], points), 0.0, edges)
        original = tf.cast(tf.tile(tf.shape(image)[1:3], [2]), tf.float32)
        return {"boxes": found * (original / edges), "scores": tf.where(inside[:, tf.newaxis], scores, 0.0)}

    return detect, {"image": tf.TensorSpec([None, None, None, None], tf.float32)}


def decide(model: keras.Model, data: runner.Data):
    """Returns the step from boxes and scores of all places to detections."""

    def detections(raw):
        return box_math.suppress(raw["boxes"], raw["scores"], _DETECTIONS, _LOWEST_SCORE, _OVERLAP)

    return detections


def _collect(call: runner.Call, data: runner.Data) -> box_math.CocoScores:
    collected = box_math.CocoScores(len(data.about["class_names"]))
    for inputs, truth in data.test:
        found = {name: np.asarray(value)[0] for name, value in call(image=inputs["image"]).items()}
        rows = (found[name][: found["count"]] for name in ("boxes", "class_ids", "scores"))
        collected.add(truth["boxes"][0].numpy(), truth["class_ids"][0].numpy(), *rows)
    return collected


def score(call: runner.Call, data: runner.Data) -> dict[str, float]:
    """COCO's mAP, AP50 and AR over the test part."""
    collected = _collect(call, data)
    try:
        return collected.scores()
    except ValueError as error:
        raise runner.AppError(f"the test part: {error}; choose another --dataset") from error


def describe(scores: dict[str, float]) -> str:
    """The line that ends a run."""
    return f"Test mAP: {scores['mAP']:.3f} | AP50: {scores['AP50']:.3f} | AR: {scores['AR']:.3f}"


def show(model: keras.Model, data: runner.Data) -> dict[str, bytes]:
    """The first validation pictures with what the model sees in them."""
    detect, choose = serve(model, data)[0], decide(model, data)
    return {"detections": _draw(lambda **inputs: choose(detect(**inputs)), data.shown, data.about["class_names"])}


def conclude(call: runner.Call, data: runner.Data, folder: Path) -> dict[str, bytes]:
    """Detections and the precision-recall curve of the test part; and files to try apps/predict.py on."""
    recall, precision = _collect(call, data).precision_recall()
    figure = Figure(figsize=(4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(recall, precision)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="Test part, IoU 0.5")
    images.write_examples([inputs["image"][0] for inputs, _ in data.test.take(_SHOWN)], folder)
    drawn = _draw(call, data.test.take(_SHOWN), data.about["class_names"])
    return {"test_detections": drawn, "precision_recall": figures.to_png(figure)}


def _draw(call: runner.Call, dataset: tf.data.Dataset, names: list[str]) -> bytes:
    """True boxes dashed in white, detections in orange with their scores."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    for index, (inputs, truth) in enumerate(dataset):
        found = {name: np.asarray(value)[0] for name, value in call(image=inputs["image"]).items()}
        axes = figure.add_subplot(2, 3, index + 1)
        axes.imshow(np.clip(inputs["image"][0] / 255, 0, 1), cmap="gray", vmin=0, vmax=1)
        for box in truth["boxes"][0].numpy():
            _outline(axes, box, edgecolor="white", linestyle="--")
        shown = int(np.sum(found["scores"] >= _SHOWN_SCORE))
        for box, label, value in zip(found["boxes"][:shown], found["class_ids"], found["scores"], strict=False):
            _outline(axes, box, edgecolor="orange")
            text = f"{value:.0%}" if len(names) == 1 else f"{names[label]} {value:.0%}"
            axes.text(box[1], box[0], text, color="orange", fontsize=6, va="bottom")
        axes.set_title(f"{len(truth['boxes'][0])} there, {shown} found", fontsize=10)
        axes.set_axis_off()
    return figures.to_png(figure)


def _outline(axes, box: np.ndarray, **style) -> None:
    ymin, xmin, ymax, xmax = box
    axes.add_patch(Rectangle((xmin, ymin), xmax - xmin, ymax - ymin, fill=False, linewidth=1, **style))


# Main

TASK = runner.Task(
    name="object_detection",
    define_flags=define_flags,
    defaults={"dataset": "deepforest", "batch_size": 8, "epochs": 25, "learning_rate": 1e-3},
    load_data=load_data,
    build_model=build_model,
    build_optimizer=build_optimizer,
    build_loss=build_loss,
    build_metrics=build_metrics,
    monitor=None,  # the last epoch, whose rate is 0: a few validation pictures choose by luck, see RESULTS.md
    serve=serve,
    decide=decide,
    score=score,
    metric="AP50",
    margin=0.003,  # 0.3 points, as the literature's parity of mAP is told
    describe=describe,
    show=show,
    conclude=conclude,
    short={"image_size": 128, "width": 16, "epochs": 8, "steps_per_epoch": 60},
)

if __name__ == "__main__":
    runner.main(TASK)
