"""Image classification: what is in the picture?

    python -m apps.image.classification --dataset=mnist_5k
    python -m apps.image.classification --dataset=fashion_mnist --model=resnet --depth=20 --augment=shift_flip
    python -m apps.image.classification --dataset=tf_flowers --model=keras_hub:resnet_18_imagenet --image_size=224

Expected of the first: 98.6% of the test part, after 34 s of training on 2 cores (2026-11-25; RESULTS.md has more).

Sources: convnet, LeCun et al. 1998, "Gradient-based learning applied to document recognition" (LeNet-5's layout, with
today's ReLU, max pooling and dropout, and wider); resnet, He et al. 2016, "Deep residual learning for image
recognition", section 4.2 (projection shortcuts, option B).
"""

import re
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import flags
from matplotlib.figure import Figure

from apps import figures, presets, runner, sets
from apps.image import resnet
from apps.image.pictures import to_channels

_CACHE_BYTES = 2**30
_SHUFFLE_BYTES = 2**29
_SHOWN = 16


# Flags


def define_flags(values: flags.FlagValues) -> None:
    """Defines what this task adds to the shared flags."""
    here = {"flag_values": values}
    flags.DEFINE_string(
        "model", "convnet", "convnet, resnet, or keras_hub:<preset> (a name from the web, or a folder).", **here
    )
    flags.DEFINE_integer("depth", 20, "Layers of resnet: 6n+2, 8 to 1202.", 8, 1202, **here)
    flags.DEFINE_integer("image_size", 32, "Height and width that the model sees, 16 to 1024 pixels.", 16, 1024, **here)
    augmentations = ["none", "shift", "flip", "shift_flip"]
    augment_help = "Random changes of training pictures: shifts by up to an eighth of the size, mirror images."
    flags.DEFINE_enum("augment", "shift", augmentations, augment_help, **here)
    flags.DEFINE_float(
        "label_smoothing", 0.05, "Share of a target spread over all classes, 0 to 0.5.", 0.0, 0.5, **here
    )
    flags.DEFINE_float(
        "weight_decay", 1e-4, "AdamW's decay, per step and unit of learning rate, 0 to 1.", 0.0, 1.0, **here
    )


# Model


def build_model(options, data: runner.Data) -> keras.Model:
    """Pictures (float32, 0 to 255) to logits (float32)."""
    size, channels, classes = options.image_size, data.about["channels"], len(data.about["class_names"])
    pictures = keras.Input([size, size, channels], name="picture")
    x = _augment(pictures, options)
    if presets.is_preset(options.model):
        x = _pretrained_features(x, options.model)
    else:
        # Scaled to [-1, 1] in float32: half has 11 bits, and a picture's 8 shall all arrive.
        x = keras.layers.Rescaling(1 / 127.5, offset=-1.0, dtype="float32", name="scale")(x)
        x = {"convnet": _convnet, "resnet": _resnet}[options.model](x, options)
    logits = keras.layers.Dense(classes, dtype="float32", name="logits")(x)
    return keras.Model(pictures, logits, name="classifier")


def _augment(x, options):
    """Random changes in training, in float32: half rounds grey values and pixel numbers."""
    if "shift" in options.augment:
        x = keras.layers.RandomTranslation(0.125, 0.125, fill_mode="constant", dtype="float32", name="shift")(x)
    if "flip" in options.augment:
        x = keras.layers.RandomFlip("horizontal", dtype="float32", name="flip")(x)
    return x


def _convnet(x, options):
    for index, filters in enumerate((32, 64), 1):
        x = keras.layers.Conv2D(filters, 5, activation="relu", name=f"conv{index}")(x)
        x = keras.layers.MaxPooling2D(2, name=f"pool{index}")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    for index, units in enumerate((256, 128), 1):
        x = keras.layers.Dropout(0.25, name=f"dropout{index}")(x)
        x = keras.layers.Dense(units, activation="relu", name=f"dense{index}")(x)
    return x


def _resnet(x, options):
    x = resnet.conv_norm(x, 16, 3, 1, "stem")
    x = keras.layers.ReLU(name="stem_relu")(x)
    for stage, filters in enumerate((16, 32, 64), 1):
        for block in range(1, (options.depth - 2) // 6 + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            x = resnet.residual_block(x, filters, stride, f"stage{stage}_block{block}")
    return keras.layers.GlobalAveragePooling2D(name="pool")(x)


def _pretrained_features(x, model: str):
    """A KerasHub backbone with its own scaling, and global average pooling."""
    import keras_hub  # here: it takes seconds, and other models don't need it

    backbone = presets.load(keras_hub.models.Backbone, model)
    converter = presets.load(keras_hub.layers.ImageConverter, model)
    if x.shape[-1] == 1:
        x = keras.layers.Concatenate(dtype="float32", name="grey_to_rgb")([x, x, x])
    scale, offset = (
        np.asarray(v if v is not None else d, "float32") for v, d in ((converter.scale, 1.0), (converter.offset, 0.0))
    )
    x = keras.layers.Rescaling(scale.tolist(), offset=offset.tolist(), dtype="float32", name="scale")(x)
    features = backbone(x)
    return keras.layers.GlobalAveragePooling2D(name="pool")(features)


def build_optimizer(options, num_steps: int) -> keras.optimizers.Optimizer:
    """AdamW with warm-up and cosine decay."""
    return runner.adamw(options.learning_rate, num_steps, options.weight_decay)


def build_loss(options) -> keras.losses.Loss:
    """Cross-entropy with label smoothing."""
    return keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=options.label_smoothing)


def build_metrics(options) -> list[keras.metrics.Metric]:
    """Accuracy."""
    return [keras.metrics.CategoricalAccuracy(name="accuracy")]


# Data


def load_data(options) -> runner.Data:
    """Reads any TFDS set with a picture and a class."""
    _check_options(options)
    wanted = {"image": "Image", "label": "ClassLabel"}
    features = sets.require_features(options, "image classification", wanted)
    builder = sets.prepare(options)
    train, validation, test = sets.split_names(builder)
    class_names = features["label"].names
    channels = 1 if features["image"].shape[-1] in (1, 2) else 3

    def read(split: str) -> tuple[tf.data.Dataset, int]:
        def fit(example):
            picture = fit_pictures(example["image"][tf.newaxis], options.image_size, channels)[0]
            return picture, example["label"]

        dataset = builder.as_dataset(split=split, shuffle_files=False).map(fit, tf.data.AUTOTUNE)
        count = builder.info.splits[split].num_examples
        small = count * options.image_size**2 * channels * 4 <= _CACHE_BYTES
        return dataset.cache() if small else dataset, count

    def one_hot(pictures, labels):
        return pictures, tf.one_hot(labels, len(class_names))

    train_set, num_train = read(train)
    if num_train < options.batch_size:
        raise runner.AppError(
            f"--batch_size={options.batch_size} is more than the {num_train} training pictures; lower it"
        )
    buffer = max(1, min(num_train, _SHUFFLE_BYTES // (options.image_size**2 * channels * 4)))

    def train_data(epoch: int) -> tf.data.Dataset:
        shuffled = train_set.shuffle(buffer, seed=sets.epoch_seed(options.seed, epoch), reshuffle_each_iteration=False)
        return shuffled.batch(options.batch_size, drop_remainder=True).map(one_hot).prefetch(tf.data.AUTOTUNE)

    return runner.Data(
        train=train_data,
        steps_per_epoch=num_train // options.batch_size,
        validation=read(validation)[0].batch(options.batch_size).map(one_hot).prefetch(tf.data.AUTOTUNE),
        test=read(test)[0].batch(options.batch_size).map(lambda x, y: ({"image": x}, y)).prefetch(tf.data.AUTOTUNE),
        about={"class_names": class_names, "image_size": options.image_size, "channels": channels},
    )


def _check_options(options) -> None:
    if options.model not in ("convnet", "resnet") and not presets.is_preset(options.model):
        raise runner.AppError(f"--model={options.model} must be convnet, resnet or keras_hub:<preset>")
    if options.model != "resnet" and "depth" in options.given:
        raise runner.AppError(f"--depth has no effect on --model={options.model}; leave it out")
    if options.model == "resnet" and options.depth % 6 != 2:
        raise runner.AppError(f"--depth={options.depth} must be 6n+2: 8, 14, 20, 32, 44, 56, 110")


def fit_pictures(pictures: tf.Tensor, size: int, channels: int) -> tf.Tensor:
    """Pictures of any size, grey or colour, with or without alpha, to what the model sees.

    The whole picture is kept: it is scaled to fit, and the rest is black, as is what alpha makes transparent.

    Args:
        pictures: number `[batch, height, width, 1 to 4]`, 0 to 255 (uint16: 0 to 65535).
        size: height and width of the result.
        channels: 1 for grey, 3 for RGB.

    Returns:
        float32 `[batch, size, size, channels]`, 0 to 255.
    """
    pictures = to_channels(pictures, channels)
    shape = tf.cast(tf.shape(pictures)[1:3], tf.float32)
    fitted = tf.maximum(1, tf.cast(tf.round(shape * size / tf.reduce_max(shape)), tf.int32))
    pictures = tf.image.resize(pictures, fitted, antialias=True)
    pictures = tf.image.resize_with_crop_or_pad(pictures, size, size)
    return tf.ensure_shape(pictures, [None, size, size, channels])


# What is served, how it is scored and shown


def serve(model: keras.Model, data: runner.Data):
    """The exported function: pictures of any size to probabilities."""

    def classify(image):
        pictures = fit_pictures(image, data.about["image_size"], data.about["channels"])
        return {"probabilities": tf.nn.softmax(model(pictures, training=False))}

    return classify, {"image": tf.TensorSpec([None, None, None, None], tf.float32)}


def score(call: runner.Call, data: runner.Data) -> dict[str, float]:
    """Cross-entropy and accuracy over the test part."""
    probabilities, labels = _predict(call, data.test)
    if labels.min() < 0:
        raise runner.AppError("the test part has no labels (-1): it can't be scored; choose another --dataset")
    likelihood = probabilities[np.arange(len(labels)), labels]
    correct = int(np.sum(np.argmax(probabilities, axis=-1) == labels))
    return {
        "loss": float(np.mean(-np.log(np.maximum(likelihood, np.finfo(np.float32).tiny)))),
        "accuracy": correct / len(labels),
        "correct": correct,
        "total": len(labels),
    }


def describe(scores: dict[str, float]) -> str:
    """The line that ends a run."""
    return (
        f"Test loss: {scores['loss']:.4f} | Accuracy: {100 * scores['accuracy']:.2f}% "
        f"({scores['correct']:.0f}/{scores['total']:.0f})"
    )


def show(model: keras.Model, data: runner.Data) -> dict[str, bytes]:
    """The first validation pictures with what the model says of them."""
    pictures, targets = next(iter(data.validation))
    pictures, targets = pictures[:_SHOWN].numpy(), targets[:_SHOWN].numpy()
    probabilities = tf.nn.softmax(model(pictures, training=False)).numpy()
    names = data.about["class_names"]
    figure = Figure(figsize=(5, 5.8), layout="constrained")
    for index, (picture, target, row) in enumerate(zip(pictures, targets, probabilities, strict=True)):
        axes = figure.add_subplot(4, 4, index + 1)
        axes.imshow(picture.squeeze() / 255, cmap="gray", vmin=0, vmax=1)
        right = row.argmax() == target.argmax()
        title = f"{names[row.argmax()]} {row.max():.0%}" + ("" if right else f"\nis {names[target.argmax()]}")
        axes.set_title(title, fontsize=10, color="black" if right else "crimson")
        axes.set_axis_off()
    return {"predictions": figures.to_png(figure)}


def conclude(call: runner.Call, data: runner.Data, folder: Path) -> dict[str, bytes]:
    """The confusion matrix of the test part; and files to try apps/predict.py on, one of each of the first classes."""
    probabilities, labels = _predict(call, data.test)
    names = data.about["class_names"]
    counts = np.zeros([len(names)] * 2, int)
    np.add.at(counts, (labels, probabilities.argmax(-1)), 1)
    left = set(range(min(len(names), _SHOWN)))
    for inputs, label in data.test.unbatch().as_numpy_iterator():
        if label in left:
            left.remove(label)
            name = re.sub(r"\W+", "_", names[label]).strip("_")
            png = tf.io.encode_png(tf.cast(tf.round(inputs["image"]), tf.uint8))
            (folder / f"{name}.png").write_bytes(png.numpy())
        if not left:
            break
    return {"confusion_matrix": figures.to_png(figures.confusion_matrix(counts, names, "pictures"))}


def _predict(call: runner.Call, dataset: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    rows = [(np.asarray(call(image=inputs["image"])["probabilities"]), labels.numpy()) for inputs, labels in dataset]
    return np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows])


# Main

TASK = runner.Task(
    name="image_classification",
    define_flags=define_flags,
    defaults={"dataset": "mnist_5k", "batch_size": 64, "epochs": 20, "learning_rate": 2e-3},
    load_data=load_data,
    build_model=build_model,
    build_optimizer=build_optimizer,
    build_loss=build_loss,
    build_metrics=build_metrics,
    monitor="val_loss",  # steadier than accuracy where the validation part is small
    serve=serve,
    score=score,
    metric="accuracy",
    margin=0.002,  # two of a thousand pictures may change sides
    describe=describe,
    show=show,
    conclude=conclude,
    short={"epochs": 6},
)

if __name__ == "__main__":
    runner.main(TASK)
