"""The parity certificate of a bundle: `causalrt compare BUNDLE` (docs/certificate.md).

ranks       P ranks as threads of this process            tables, weights   what lies in the bundle's files
watch       what a rank computes and exchanges, recorded  transport, canary what the exchange moves
rollouts    whole rollouts of a side                      segments          each ONNX segment, fed with eager's own tensors
runners     the sides as Polygraphy runners               polygraphy_files  what `polygraphy run` can check again
compare     errors, tolerances, comparisons               report, picture   JSON, Markdown, PNG
"""
