"""Proof: recordings of the reference replayed (`causalrt compare --recorded`), and certificates (`causalrt compare BUNDLE`).

Both stand on three things: a replica (an executor on all ranks), a rollout, and the differences between two sets of tensors.

replica, ranks, trace     executors on all ranks of this process, ranks as threads; what they compute and exchange
rollouts                  a rollout from a recording or a seed, by a replica or through the rank processes
differences               how far tensors are apart; all rules and tolerances
recording, compare        the recordings' format; their replay
emulate, emulated_graph   TensorRT's graphs run by ONNX Runtime
command, certify          the command's arguments; everything that a certificate checks, in order
certificate, report       the findings; JSON, Markdown, picture
file_checks               tables, references and weights in the bundle's files
traced_rollout            the rollout of a certificate and its traces
comparisons               rollouts and exchanges of replicas, rank processes
step_comparisons          single steps and segments, and where the first difference arises
segments                  each ONNX segment run on eager's tensors; files for `polygraphy run`
"""
