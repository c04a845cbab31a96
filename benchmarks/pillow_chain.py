"""Reference implementation of the augmentations, with Pillow and NumPy.

It is the oracle of the tests and the baseline of the benchmarks. It applies
given parameters as torchvision and the released code of CLSA do, and shares no
code with `clsa_tf`. Images are u8[H,W,3] arrays, except that `OPS` and `make`
work on Pillow images. Levels are integers in hundredths, except that `OPS` take
them as the released code does, as floats in 0..10.
"""

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

_AFFINE = Image.Transform.AFFINE
_BILINEAR = Image.Resampling.BILINEAR


def _fraction(level, maximum):
    return float(level) * maximum / 10


def _whole(level, maximum):
    return int(_fraction(level, maximum))


def _factor(level):
    return _fraction(level, 0.9) + 0.05


def _shear_x(image, level, sign):
    shear = sign * _fraction(level, 0.3)
    return image.transform(image.size, _AFFINE, (1, shear, 0, 0, 1, 0))


def _shear_y(image, level, sign):
    shear = sign * _fraction(level, 0.3)
    return image.transform(image.size, _AFFINE, (1, 0, 0, shear, 1, 0))


def _translate_x(image, level, sign):
    pixels = int(sign * _fraction(level, 0.3) * image.size[0])
    return image.transform(image.size, _AFFINE, (1, 0, pixels, 0, 1, 0))


def _translate_y(image, level, sign):
    pixels = int(sign * _fraction(level, 0.3) * image.size[1])
    return image.transform(image.size, _AFFINE, (1, 0, 0, 0, 1, pixels))


OPS = {
    "AutoContrast": lambda x, v, s: ImageOps.autocontrast(x),
    "Brightness": lambda x, v, s: ImageEnhance.Brightness(x).enhance(
        _factor(v)
    ),
    "Color": lambda x, v, s: ImageEnhance.Color(x).enhance(_factor(v)),
    "Contrast": lambda x, v, s: ImageEnhance.Contrast(x).enhance(_factor(v)),
    "Equalize": lambda x, v, s: ImageOps.equalize(x),
    "Identity": lambda x, v, s: x,
    "Invert": lambda x, v, s: ImageOps.invert(x),
    "Posterize": lambda x, v, s: ImageOps.posterize(x, _whole(v, 4) + 4),
    "Rotate": lambda x, v, s: x.rotate(s * _fraction(v, 30)),
    "Sharpness": lambda x, v, s: ImageEnhance.Sharpness(x).enhance(_factor(v)),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "Solarize": lambda x, v, s: ImageOps.solarize(x, 256 - _whole(v, 256)),
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
}


_NAMES = list(OPS)


def op(name, image, level, sign):
    """One strong operation on an array; level in hundredths, sign -1 or 1."""
    result = OPS[name](Image.fromarray(image), int(level) / 100, int(sign))
    return np.asarray(result)


def hue(image, factor):
    """torchvision's `adjust_hue` on a Pillow image."""
    h, s, v = image.convert("HSV").split()
    shift = np.int32(float(factor) * 255).astype(np.uint8)
    h = Image.fromarray(np.asarray(h) + shift)
    return Image.merge("HSV", (h, s, v)).convert("RGB")


_JITTERS = (
    lambda x, f: ImageEnhance.Brightness(x).enhance(f),
    lambda x, f: ImageEnhance.Contrast(x).enhance(f),
    lambda x, f: ImageEnhance.Color(x).enhance(f),
    hue,
)


def texture(image, params):
    """Mixes an array with its convolution, in integers."""
    kernel = np.asarray(params["kernel"], np.int64).reshape(3, 3)
    alpha = int(params["alpha"])
    height, width = image.shape[:2]
    padded = np.pad(image, [(1, 1), (1, 1), (0, 0)], "edge").astype(np.int64)
    convolved = sum(
        kernel[y, x] * padded[y : y + height, x : x + width]
        for y in range(3)
        for x in range(3)
    )
    # In units of 1/64**2: kernel and alpha are in units of 1/64.
    mixed = alpha * 64 * image.astype(np.int64) + (64 - alpha) * convolved
    return np.clip((mixed + 2048) // 4096, 0, 255).astype(np.uint8)


def _jitter(image, params):
    if params["jitter"]:
        factors = np.asarray(params["factors"])
        for index in np.asarray(params["order"]):
            image = _JITTERS[index](image, float(factors[index]))
    return image


def _gray(image, params):
    return image.convert("L").convert("RGB") if params["gray"] else image


_TURNS = (
    None,
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
)


def _weak(image, params, gray_first=False):
    if params.get("rotation"):
        image = image.transpose(_TURNS[int(params["rotation"])])
    for step in (_gray, _jitter) if gray_first else (_jitter, _gray):
        image = step(image, params)
    if "texture" in params and params["texture"]["apply"]:
        image = texture(np.asarray(image), params["texture"])
        image = Image.fromarray(image)
    if params["blur"]:
        sigma = float(params["sigma"])
        image = image.filter(ImageFilter.GaussianBlur(radius=sigma))
    if params.get("solarize"):
        image = ImageOps.solarize(image, 128)
    if params["flip"]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def _strong(image, params):
    columns = [np.asarray(params[k]) for k in ("op", "level", "apply", "sign")]
    for index, level, applied, sign in zip(*columns):
        if applied:
            image = OPS[_NAMES[index]](image, int(level) / 100, int(sign))
    return image


def weak(image, params, gray_first=False):
    """Weak chain of an array, including the optional parts in `params`."""
    return np.asarray(_weak(Image.fromarray(image), params, gray_first))


def strong(image, params):
    """Strong operations of `params` on an array."""
    return np.asarray(_strong(Image.fromarray(image), params))


def _chain(image, params, gray_first=False):
    image = _weak(image, params, gray_first)
    return _strong(image, params["strong"]) if "strong" in params else image


def chain(image, params, gray_first=False):
    """Weak chain and, if drawn, strong operations of a cropped array."""
    return np.asarray(_chain(Image.fromarray(image), params, gray_first))


def make(image, params, size):
    """Makes a view from a Pillow image without conversions, as published."""
    top, left, height, width = (int(x) for x in params["box"])
    image = image.crop((left, top, left + width, top + height))
    return _chain(image.resize((size, size), _BILINEAR), params)


def resize_box(image, box, size):
    """torchvision's `resized_crop`; box is (top, left, height, width)."""
    top, left, height, width = (int(x) for x in box)
    crop = Image.fromarray(image).crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), _BILINEAR))


def central(image, size, short):
    """torchvision's `Resize(short)` then `CenterCrop(size)`."""
    height, width = image.shape[:2]
    if width <= height:
        resized = (short, int(short * height / width))
    else:
        resized = (int(short * width / height), short)
    image = Image.fromarray(image).resize(resized, _BILINEAR)
    left = int(round((resized[0] - size) / 2.0))
    top = int(round((resized[1] - size) / 2.0))
    return np.asarray(image.crop((left, top, left + size, top + size)))


def view(image, params, size):
    """Crop, weak chain and, if drawn, strong operations of an array."""
    return np.asarray(make(Image.fromarray(image), params, size))


def photograph(height, width, seed=0):
    """Makes a smooth random colour image with some noise, u8[H,W,3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    large = Image.fromarray(coarse).resize((width, height), _BILINEAR)
    noise = rng.normal(0, 12, (height, width, 3))
    return np.clip(np.asarray(large) + noise, 0, 255).astype(np.uint8)
