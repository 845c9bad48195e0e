"""Explain a photo with onnxruntime, numpy and Pillow alone: python explain_onnx.py FILE.onnx PHOTO."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1])
card = json.loads(session.get_modelmeta().custom_metadata_map["bla"])
transform = card["transform"]  # "squash": the whole photo; for "crop" take the centre first
height, width = transform["size"]
resample = Image.Resampling[transform["interpolation"].upper()]
photo = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB").resize((width, height), resample)
pixels = (np.asarray(photo, np.float32) / 255 - transform["mean"]) / transform["std"]
feeds = {"pixels": pixels.transpose(2, 0, 1)[np.newaxis].astype(np.float32)}
outputs = session.run(["classifier_logits", "logits", "selected"], feeds)
whole, alone, selected = (values[0] for values in outputs)
for logits, source in ((whole, "the classifier"), (alone, f"{selected.sum()} of {selected.size} cells alone")):
    odds = np.exp(logits - logits.max())
    print(f"{source}: {card['classes'][logits.argmax()]} {odds.max() / odds.sum():.1%}")
print("\n".join(" ".join("#" if cell else "." for cell in row) for row in selected))
