"""The parity certificate of a bundle: `causalrt compare BUNDLE` (docs/certificate.md).

command, certify      arguments; everything that is checked, in order
subject, record       what a certificate is about, and what it holds
tables, weights       what lies in the bundle's files
ranks, watch, sides   P ranks as threads of this process, and what they compute and exchange, written down
rollouts, processes   whole rollouts of a side: in threads, and by the real rank processes
runners, errors       the sides as Polygraphy runners; how far two tensors are apart
stage, *_comparisons  what is compared with what; numerics is the order
transport, segments   what the exchanges have moved; each ONNX segment, fed with eager's own tensors
bisect                where the first difference arises
polygraphy_files      what `polygraphy run` can check again
report, picture       JSON, Markdown, PNG
"""
