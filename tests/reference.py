"""LLaMA 2 once more, in NumPy and from Meta's formulas: complex rotations, repeated heads, loops over rows and heads.

It shares no line with `llama_fn`, and nothing is computed the same way: what the two agree on is right in both.
"""

import numpy as np


def logits(params, tokens) -> np.ndarray:
    """The logits of one sequence, in float64."""
    config = params.config
    x = _numpy(params.embedding)[np.asarray(tokens)]
    for block in params.blocks:
        x = x + _attention(block.attention, _rms_norm(_numpy(block.attention_norm), x, config.norm_eps), config)
        y = _rms_norm(_numpy(block.ffn_norm), x, config.norm_eps)
        gate, up, down = (_numpy(w) for w in (block.feed_forward.w_gate, block.feed_forward.w_up,
                                              block.feed_forward.w_down))
        z = y @ gate.T
        x = x + (z / (1 + np.exp(-z)) * (y @ up.T)) @ down.T
    return _rms_norm(_numpy(params.norm), x, config.norm_eps) @ _numpy(params.output).T


def _attention(params, x, config) -> np.ndarray:
    h = config.head_dim
    wq, wk, wv = (_numpy(w).reshape(-1, config.dim) for w in (params.wq, params.wk, params.wv))
    wo = _numpy(params.wo).reshape(config.dim, -1)
    out = []
    for head in range(config.n_heads):
        shared = head // (config.n_heads // config.n_kv_heads)
        q = _rotate(x @ wq[head * h:(head + 1) * h].T, config)
        k = _rotate(x @ wk[shared * h:(shared + 1) * h].T, config)
        v = x @ wv[shared * h:(shared + 1) * h].T
        rows = []
        for t in range(len(x)):
            scores = q[t] @ k[:t + 1].T / np.sqrt(h)
            weights = np.exp(scores - scores.max())
            rows.append(weights / weights.sum() @ v[:t + 1])
        out.append(np.stack(rows))
    return np.concatenate(out, axis=1) @ wo.T


def _rotate(x, config) -> np.ndarray:
    """Each pair of numbers is a complex one, turned by exp(i m theta^(-2j/h))."""
    t, h = x.shape
    wavelengths = [_stretched(2 * np.pi * config.rope_theta ** (2 * j / h), config) for j in range(h // 2)]
    # Meta's `freqs` and their outer product with the positions are float32; all else here is float64.
    frequencies = (2 * np.pi / np.array(wavelengths)).astype(np.float32)
    angles = np.arange(t, dtype=np.float32)[:, None] * frequencies
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles.astype(np.float64))
    return np.stack([turned.real, turned.imag], axis=-1).reshape(t, h)


def _stretched(wavelength, config) -> float:
    """A wavelength (in tokens) after RoPE's scaling: Meta's three cases, or the one of linear interpolation."""
    scaling = config.rope_scaling
    if scaling is None:
        return wavelength
    if scaling.kind == "linear" or wavelength > scaling.original_max_seq_len / scaling.low_freq_factor:
        return scaling.factor * wavelength
    if wavelength < scaling.original_max_seq_len / scaling.high_freq_factor:
        return wavelength
    smooth = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor)
    return wavelength / ((1 - smooth) / scaling.factor + smooth)


def _rms_norm(weight, x, eps) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _numpy(x) -> np.ndarray:
    return x.detach().double().numpy()
