"""The decoder of machine translation: its layers, and a step of one token with a cache.

Keys and values of the tokens so far are kept, so that each token costs one row of attention. KerasHub's
TransformerDecoder can do that too, but by an operation of XLA that plain servers don't have, and for each sequence of a
beam it keeps the encoder's keys and values once more.

Sources: Vaswani et al. 2017, arXiv:1706.03762; Press and Wolf 2017, arXiv:1608.05859 (one table); Xiong et al. 2020,
arXiv:2002.04745 (normalisation in front).
"""

import keras
import keras_hub
import tensorflow as tf

from apps.text import pieces, search
from apps.text.encoder import HEAD_WIDTH


class TiedDense(keras.layers.Dense):
    """Vectors to a logit for each token, by the table that embeds the tokens."""

    def __init__(self, embedding: keras.layers.Embedding, **settings):
        super().__init__(embedding.input_dim, use_bias=False, **settings)
        self.embedding = embedding

    def build(self, input_shape):
        """Makes no weight."""
        self.bias, self.built = None, True

    @property
    def kernel(self):
        """The table, transposed, in the dtype that this layer computes in."""
        return keras.ops.transpose(self.embedding.embeddings)


class DecoderBlock(keras.layers.Layer):
    """A layer of the decoder, on whole texts for training and token by token for the search."""

    def __init__(self, width: int, dropout: float, **settings):
        super().__init__(**settings)
        policy = {"dtype": self.dtype_policy}

        def attention(name: str):
            heads = width // HEAD_WIDTH
            return keras_hub.layers.CachedMultiHeadAttention(heads, HEAD_WIDTH, dropout=dropout, name=name, **policy)

        self.self_attention_norm = keras.layers.LayerNormalization(name="self_attention_norm", **policy)
        self.self_attention = attention("self_attention")
        self.cross_attention_norm = keras.layers.LayerNormalization(name="cross_attention_norm", **policy)
        self.cross_attention = attention("cross_attention")
        self.dense_norm = keras.layers.LayerNormalization(name="dense_norm", **policy)
        self.inner = keras.layers.Dense(4 * width, activation="relu", name="inner", **policy)
        self.outer = keras.layers.Dense(width, name="outer", **policy)
        self.dropout = keras.layers.Dropout(dropout, name="dropout", **policy)

    def call(self, x, padding_mask, encoded=None, cache=None, cross_cache=None, training=None):
        """Computes whole texts from `encoded`, or the next tokens from both caches.

        Args:
            x: `[batch, length, width]`; with caches `[batch * beam, 1, width]`.
            padding_mask: bool `[batch, source length]`, what is text in the source.
            encoded: `[batch, source length, width]`, the encoder's output.
            cache: `[batch * beam, 2, tokens before, heads, head width]`, their keys and values.
            cross_cache: what `project` returned.
            training: whether units are dropped.

        Returns:
            As x; with caches also the cache with the new tokens.
        """
        y = self.self_attention_norm(x)
        if cache is None:
            length = tf.shape(x)[1]
            causal = tf.range(length)[:, tf.newaxis] >= tf.range(length)
            y = self.self_attention(y, y, attention_mask=causal[tf.newaxis], training=training)
        else:
            cache = tf.concat([cache, _keys_and_values(self.self_attention, y)], axis=2)
            y, _ = self.self_attention(y, y, cache=cache, training=training)
        x += self.dropout(y, training=training)
        y = self.cross_attention_norm(x)
        if cross_cache is None:
            y = self.cross_attention(y, encoded, attention_mask=padding_mask[:, tf.newaxis], training=training)
        else:
            # The sequences of a beam are so many queries of one text: its keys and values are there once.
            y, together = tf.reshape(y, [tf.shape(cross_cache)[0], -1, x.shape[-1]]), tf.shape(y)
            mask = padding_mask[:, tf.newaxis]
            y, _ = self.cross_attention(y, y, attention_mask=mask, cache=cross_cache, training=training)
            y = tf.reshape(y, together)
        x += self.dropout(y, training=training)
        y = self.outer(self.inner(self.dense_norm(x)))
        x += self.dropout(y, training=training)
        return x if cache is None else (x, cache)

    def project(self, encoded):
        """Returns what the cross attention knows of a source, `[batch, 2, source length, heads, head width]`."""
        return _keys_and_values(self.cross_attention, encoded)

    def empty_cache(self, batch):
        """Returns the cache of `batch` sequences without a token."""
        heads = self.self_attention.num_heads
        return tf.zeros([batch, 2, 0, heads, HEAD_WIDTH], self.compute_dtype)


def _keys_and_values(attention: keras.layers.MultiHeadAttention, x):
    return tf.stack([attention.key_dense(x), attention.value_dense(x)], axis=1)


# Token by token


def token_by_token(
    model: keras.Model, encoded: tf.Tensor, source_ids: tf.Tensor
) -> tuple[search.Step, list[tf.Tensor]]:
    """Returns the decoder as a step of one token, and its first caches."""
    blocks = [layer for layer in model.layers if isinstance(layer, DecoderBlock)]
    cross_caches = [block.project(encoded) for block in blocks]
    embedding, norm = model.get_layer("target_embedding"), model.get_layer("decoder_norm")
    keys = model.get_layer("lexicon").project(encoded)
    padding_mask = source_ids != pieces.PAD

    def step(token_ids, index, caches):
        x, new_caches = embedding(token_ids[:, tf.newaxis], start=index), []
        for block, cache, cross_cache in zip(blocks, caches, cross_caches, strict=True):
            cache = tf.ensure_shape(cache, [None, 2, None, *cross_cache.shape[3:]])  # the loop forgets it
            x, cache = block(x, padding_mask, cache=cache, cross_cache=cross_cache, training=False)
            new_caches.append(cache)
        return log_probs(model, norm(x), keys, source_ids), new_caches

    return step, [block.empty_cache(tf.shape(encoded)[0]) for block in blocks]


def log_probs(model: keras.Model, decoded: tf.Tensor, keys: tf.Tensor, source_ids: tf.Tensor) -> tf.Tensor:
    """Returns those of the next token, float32 `[rows, vocabulary]`, of what the decoder made of the last one.

    Args:
        model: of `apps.text.translation`.
        decoded: `[rows, 1, width]`, the rows of one text behind one another.
        keys: of the source, as the lexicon projects them, `[batch, source length, width]`.
        source_ids: int32 `[batch, source length]`.
    """
    projection, lexicon, add = (model.get_layer(name) for name in ("projection", "lexicon", "logits"))
    # The rows are so many queries of one text.
    queries = tf.reshape(decoded, [tf.shape(keys)[0], -1, decoded.shape[-1]])
    logits = add([projection(queries), lexicon.look_up(queries, keys, source_ids)])
    return tf.nn.log_softmax(tf.reshape(logits, [tf.shape(decoded)[0], logits.shape[-1]]))
