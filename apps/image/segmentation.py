"""Semantic segmentation: of what class is each pixel?

    python -m apps.image.segmentation --dataset=blue_marble
    python -m apps.image.segmentation --dataset=oxford_iiit_pet --image_size=256 --augment=flip --width=16

Expected of the first: 79.2% mIoU of the test part, lakes 40.2%, after 20 minutes on 2 cores with other programs beside
it (2026-11-25). Colour alone has 74.9% and 27.5% (benchmarks/colour_threshold.py).

A U-Net: the picture is halved `--depth` times while the channels double, and doubled again, joined each time with what
was there before. KerasHub has none, so it is written here, with today's BatchNormalization and same padding, and with
a second path past it for what each pixel's colour tells. It trains on windows, and serves pictures of any size.

The loss is cross-entropy, weighted by class, and soft Dice, both in float32 (`apps.image.masks`).

Source: Ronneberger et al. 2015, "U-Net", arXiv:1505.04597, section 2.
"""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import flags
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from apps import figures, runner, sets
from apps.image import masks, pictures, resnet

_COUNTED = 2000  # training masks that the weights of classes come from
_LONGEST = 1024  # pixels of a served picture's longer side; memory bounds it
_WEIGHT_DECAY = 0.01
_SHOWN = 4


# Flags


def define_flags(values: flags.FlagValues) -> None:
    """Defines what this task adds to the shared flags."""
    pictures.define_flags(values, image_size=128, windows=1, multiple="2^depth", changes="the zoom")
    here = {"flag_values": values}
    flags.DEFINE_integer("width", 8, "Channels at full size, 1 to 256; they double with each halving.", 1, 256, **here)
    flags.DEFINE_integer("depth", 4, "How often the size is halved, 1 to 5.", 1, 5, **here)
    flags.DEFINE_float("dice_weight", 0.5, "Weight of Dice; cross-entropy's is 1; 0 to 10.", 0.0, 10.0, **here)


# Model


def build_model(options, data: runner.Data) -> keras.Model:
    """Pictures of any size that halves `depth` times (float32, 0 to 255) to logits of each pixel (float32)."""
    picture = keras.Input([None, None, data.about["channels"]], name="picture")
    values = _encode_values(picture)
    x, skips = values, []
    for level in range(options.depth):
        x = _two_convolutions(x, options.width * 2**level, f"down{level}")
        skips.append(x)
        x = keras.layers.MaxPooling2D(2, name=f"down{level}_pool")(x)
    x = _two_convolutions(x, options.width * 2**options.depth, "bottom")
    for level in reversed(range(options.depth)):
        filters = options.width * 2**level
        x = keras.layers.Conv2DTranspose(filters, 2, strides=2, name=f"up{level}_double")(x)
        x = keras.layers.Concatenate(name=f"up{level}_join")([skips[level], x])
        x = _two_convolutions(x, filters, f"up{level}")
    x = keras.layers.Concatenate(name="both")([x, _colours(values, 2 * options.width)])
    logits = keras.layers.Conv2D(len(data.about["class_names"]), 1, dtype="float32", name="logits")(x)
    return keras.Model(picture, logits, name="unet")


def _encode_values(x):
    """Values on a linear and on a logarithmic scale, in float32: half would round them before they are scaled.

    Of dark pixels the linear scale tells little: lakes and sea are a few grey values of 255 apart.
    """
    linear = keras.layers.Rescaling(1 / 127.5, offset=-1.0, dtype="float32", name="linear")(x)
    x = keras.layers.ReLU(dtype="float32", name="positive")(x)
    x = keras.layers.Rescaling(1 / 32, offset=4 / 32, dtype="float32", name="before_log")(x)
    return keras.layers.Concatenate(dtype="float32", name="scales")([linear, keras.ops.log(x)])


def _colours(x, filters: int):
    """What the colour of each pixel tells by itself, without BatchNormalization.

    That measures each batch anew, and small differences of colour are lost where one batch holds more ice and the next
    more sea. Lakes' IoU on validation after three epochs of batches of 4, width 8: 0.099; without this path 0.009.
    """
    for part in "ab":
        x = keras.layers.Conv2D(filters, 1, activation="relu", name=f"colours_{part}")(x)
    return x


def _two_convolutions(x, filters: int, name: str):
    for part in "ab":
        x = resnet.conv_norm(x, filters, 3, 1, f"{name}_{part}")
        x = keras.layers.ReLU(name=f"{name}_{part}_relu")(x)
    return x


def build_optimizer(options, num_steps: int) -> keras.optimizers.Optimizer:
    """AdamW with warm-up and cosine decay."""
    return runner.adamw(options.learning_rate, num_steps, _WEIGHT_DECAY)


def build_loss(options) -> keras.losses.Loss:
    """Weighted cross-entropy and Dice."""
    return masks.CrossEntropyAndDice(options.dice_weight)


def build_metrics(options) -> list[keras.metrics.Metric]:
    """Mean IoU."""
    return [masks.MeanIoU()]


# Data


def load_data(options) -> runner.Data:
    """Reads any TFDS set with a picture and a mask of its size."""
    multiple = 2**options.depth
    if options.image_size % multiple:
        raise runner.AppError(
            f"--image_size={options.image_size} can't be halved {options.depth} times (--depth); "
            f"choose a multiple of {multiple}"
        )
    wanted = {"image": "Image", "segmentation_mask": "Image or LabeledImage"}
    features = sets.require_features(options, "segmentation", wanted)
    if features["segmentation_mask"].shape[-1] != 1:
        raise runner.AppError(
            f"--dataset={options.dataset}: its segmentation_mask has the shape {features['segmentation_mask'].shape}; "
            "segmentation needs one channel that holds classes"
        )
    builder = sets.prepare(options)
    train, validation, test = sets.split_names(builder)
    lowest, about = _classes(options, features["segmentation_mask"], builder, train)
    channels = 1 if features["image"].shape[-1] in (1, 2) else 3

    def whole(example):
        labels = masks.to_labels(example["segmentation_mask"], lowest, len(about["class_names"]))
        return {"image": pictures.to_channels(example["image"], channels)}, labels[..., 0]

    def window(augment: str):
        def make(example, seed):
            inputs, labels = whole(example)
            return masks.cut_window(inputs["image"], labels, options.image_size, augment, seed, about["class_weights"])

        return make

    batches, steps = pictures.training_windows(*pictures.read(builder, train), options, window(options.augment))
    same_size = None not in features["image"].shape
    test_set = pictures.read(builder, test)[0].map(whole, tf.data.AUTOTUNE)
    return runner.Data(
        train=batches,
        steps_per_epoch=steps,
        validation=pictures.validation_windows(pictures.read(builder, validation)[0], options, window("none")),
        test=test_set.batch(options.batch_size if same_size else 1).prefetch(tf.data.AUTOTUNE),
        about=about | {"channels": channels, "multiple": multiple},
    )


def _classes(options, mask, builder: tfds.core.DatasetBuilder, train: str) -> tuple[int, dict]:
    """The value of the first class in masks; the classes' names and weights."""
    decoders = {"image": tfds.decode.SkipDecoding()}
    examples = builder.as_dataset(split=train, shuffle_files=False, decoders=decoders).take(_COUNTED)
    examples = examples.map(lambda example: tf.cast(example["segmentation_mask"], tf.int32), tf.data.AUTOTUNE)
    rows = [np.bincount(values.ravel(), minlength=masks.IGNORED + 1) for values in examples.as_numpy_iterator()]
    counts = np.stack([row[: masks.IGNORED] for row in rows])
    names = list(mask.names) if isinstance(mask, tfds.features.LabeledImage) else None
    (found,) = np.nonzero(counts.sum(axis=0)[: names and len(names)])
    if len(found) < 2 or len(names or found) > masks.IGNORED:
        raise runner.AppError(
            f"--dataset={options.dataset}: its training masks hold {len(found)} classes of {len(names or found)}; "
            f"segmentation needs 2 to {masks.IGNORED} (a value of {masks.IGNORED} means that a pixel doesn't count)"
        )
    lowest = 0 if names else int(found[0])  # masks without names may count from 1, as oxford_iiit_pet's
    names = names or [str(value) for value in range(lowest, found[-1] + 1)]
    counts = counts[:, lowest : lowest + len(names)]
    return lowest, {"class_names": names, "class_weights": masks.weights_of_classes(counts)}


# What is served, how it is scored and shown


def serve(model: keras.Model, data: runner.Data):
    """The exported function: pictures of any size to the probabilities of each of their pixels."""

    def segment(image):
        fitted, filled = pictures.shrink_and_pad(
            pictures.to_channels(image, data.about["channels"]), _LONGEST, data.about["multiple"]
        )
        probabilities = tf.nn.softmax(model(fitted, training=False))[:, : filled[0], : filled[1]]
        shape = tf.shape(image)[1:3]
        probabilities = tf.cond(
            tf.reduce_all(filled == shape), lambda: probabilities, lambda: tf.image.resize(probabilities, shape)
        )
        return {"probabilities": probabilities / tf.reduce_sum(probabilities, -1, keepdims=True)}

    return segment, {"image": tf.TensorSpec([None, None, None, None], tf.float32)}


def decide(model: keras.Model, data: runner.Data):
    """The most likely class of each pixel."""

    def most_likely(outputs):
        class_map = tf.argmax(outputs["probabilities"], -1, output_type=tf.int32)
        return {"class_map": class_map, "probabilities": outputs["probabilities"]}

    return most_likely


def score(call: runner.Call, data: runner.Data) -> dict[str, float]:
    """Cross-entropy and overlaps over all pixels of the test part."""
    names = data.about["class_names"]
    counts, loss = np.zeros([len(names)] * 2, np.int64), 0.0
    for inputs, labels in data.test:
        outputs, labels = call(**inputs), labels.numpy()
        counts += masks.confusion(labels, np.asarray(outputs["class_map"]), len(names))
        inside = labels < len(names)
        likelihood = np.asarray(outputs["probabilities"])[inside, labels[inside]]
        loss -= np.log(np.maximum(likelihood, np.finfo(np.float32).tiny)).sum(dtype=np.float64)
    if not counts.any():
        raise runner.AppError("the test part has no pixel of any class: it can't be scored; choose another --dataset")
    return {"loss": float(loss / counts.sum())} | masks.overlaps(counts, names) | {"total": int(counts.sum())}


def describe(scores: dict[str, float]) -> str:
    """The line that ends a run."""
    classes = ", ".join(f"{key[4:]} {100 * value:.2f}%" for key, value in scores.items() if key.startswith("iou_"))
    return f"Test loss: {scores['loss']:.4f} | mIoU: {100 * scores['miou']:.2f}% ({classes})"


def show(model: keras.Model, data: runner.Data) -> dict[str, bytes]:
    """The first validation windows, their masks, and what the model says."""
    windows, targets = next(iter(data.validation))
    logits = model(windows[:_SHOWN], training=False)
    rows = zip(windows.numpy(), targets.numpy()[..., 0].astype(int), np.argmax(logits, -1), strict=False)
    return {"predictions": figures.to_png(_overlays(list(rows), data.about["class_names"]))}


def conclude(call: runner.Call, data: runner.Data, folder: Path) -> dict[str, bytes]:
    """IoU by class; and the test pictures with the most classes, also as files to try apps/predict.py on."""
    names = data.about["class_names"]
    counts, examples = np.zeros([len(names)] * 2, np.int64), []
    for inputs, labels in data.test:
        labels, predictions = labels.numpy(), np.asarray(call(**inputs)["class_map"])
        counts += masks.confusion(labels, predictions, len(names))
        for example in zip(inputs["image"].numpy(), labels, predictions, strict=True):
            sizes = np.bincount(example[1][example[1] < len(names)])
            # Of those with as many classes, the one whose smallest is largest.
            examples.append((np.count_nonzero(sizes), sizes[sizes > 0].min(initial=2**31), example))
        examples = sorted(examples, key=lambda entry: entry[:2], reverse=True)[:_SHOWN]
    rows = [example for *_, example in examples]
    pictures.write_examples([picture for picture, *_ in rows], folder)
    bars = Figure(figsize=(4, 1 + 0.25 * len(names)), layout="constrained")
    ious = [masks.overlaps(counts, names).get(f"iou_{name}", 0.0) for name in names]
    axes = bars.add_subplot(xlim=(0, 1.2), title="Test part: IoU")
    axes.bar_label(axes.barh(names[::-1], ious[::-1]), fmt="%.3f", padding=2)
    return {"iou": figures.to_png(bars), "examples": figures.to_png(_overlays(rows, names))}


def _overlays(rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], names: list[str]) -> Figure:
    """A figure with a row for each picture: itself, its mask and the prediction laid over it."""
    palette = np.array(colormaps["tab10"].colors)
    figure = Figure(figsize=(5, 0.4 + 1.7 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for line, (picture, labels, predictions) in zip(axes, rows, strict=True):
        picture = np.broadcast_to(np.clip(picture / 255, 0, 1), [*picture.shape[:2], 3])
        line[0].imshow(picture)
        for place, classes in zip(line[1:], (labels, predictions), strict=True):
            colours = np.where((classes < len(names))[..., np.newaxis], palette[classes % len(palette)], 0)
            place.imshow(np.clip(0.4 * picture + 0.6 * colours, 0, 1))
        for place in line:
            place.set_axis_off()
    for place, title in zip(axes[0], ("picture", "mask", "prediction"), strict=True):
        place.set_title(title, fontsize=10)
    patches = [Patch(color=colour, label=name) for colour, name in zip(palette, names, strict=False)]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


# Main

TASK = runner.Task(
    name="semantic_segmentation",
    define_flags=define_flags,
    defaults={"dataset": "blue_marble", "batch_size": 4, "epochs": 20, "learning_rate": 5e-3},
    load_data=load_data,
    build_model=build_model,
    build_optimizer=build_optimizer,
    build_loss=build_loss,
    build_metrics=build_metrics,
    monitor="val_miou",
    serve=serve,
    decide=decide,
    score=score,
    metric="miou",
    margin=0.002,
    describe=describe,
    show=show,
    conclude=conclude,
    short={"image_size": 64, "epochs": 5},
)

if __name__ == "__main__":
    runner.main(TASK)
