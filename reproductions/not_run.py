"""Claims that nothing here answers yet, with the papers' own figures."""

from __future__ import annotations

from reproductions.harness.claims import Claim


def _open(source: str, says: str, theirs: str = "") -> Claim:
    return Claim(source, says, theirs, "not run")


CLAIMS = (
    _open(
        "NL Table 1",
        "needles in a haystack to 16K tokens: Hope above Titans and other recurrent models, below attention on several",
        "S-NIAH-2 at 16K: Transformer 94.2, Hope-Attention 94.4, Hope 78.2, Titans 75.4, RWKV-7 12.6",
    ),
    _open(
        "NL Table 2",
        "language models of 760M and 1.3B parameters: Hope below all others",
        "Wiki ppl at 1.3B: Hope 14.39, Titans 15.60, Transformer++ 17.92",
    ),
    _open(
        "NL Table 3",
        "in-context recall: Hope above other recurrent models, below attention",
        "SWDE, FDA: Transformer 71.4, 67.3; Hope 65.9, 41.9; Titans 60.8, 37.6",
    ),
    _open(
        "NL Table 4",
        "MAD's five tasks: Hope first or level on all",
        "fuzzy recall: Hope 52.1, Titans 50.0, Transformer 47.9",
    ),
    _open(
        "NL Table 5 (others)",
        "five formal languages besides parity",
        "(aa)*, longer than trained on: Hope 100, DeltaNet 100, Transformer 0",
    ),
    _open(
        "NL Table 6",
        "every part of Hope lowers perplexity",
        "Hope 12.24; without DGD 13.41, momentum 13.58, retention 13.71, CMS 13.04; k fixed 13.77, v fixed 13.90",
    ),
    _open("NL Figure 6 (Banking77)", "Hope above in-context learning, EWC and InCA on 77 classes of Banking"),
    _open("NL Figure 7", "more levels, and a slower slowest one, improve question answering in context"),
    _open("NL Figure 9", "BABILong after fine-tuning: Hope holds to 10M tokens, Titans and ARMT fall after 1M"),
    _open("NL Figure 10", "perplexity falls with more context"),
    _open("NL Figure 11 (ImageNet-21K)", "a vision transformer at that size: M3 below Muon below AdamW"),
    _open(
        "NL-cr Table 1",
        "language models of 1.3B parameters, 100B tokens: Hope first in perplexity and on average",
        "Wiki ppl: Hope 15.11, Titans 15.60, Samba 16.13, Transformer++ 18.53",
    ),
    _open("Titans Table 1", "language models and common sense, 340M to 760M parameters: Titans above its baselines"),
    _open("Titans Table 2", "single needles in a haystack to 16K tokens: Titans above recurrent baselines"),
    _open("Titans Table 3", "time series: the neural memory level with or above specialised models"),
    _open(
        "Titans Table 4",
        "DNA: the neural memory competitive on GenomicsBenchmarks",
        "Enhancer Cohn 75.2, Based 74.6, HyenaDNA 74.2",
    ),
    _open(
        "Titans Table 5",
        "every part of Titans' memory matters, retention most",
        "ppl 27.01; without retention 29.04, momentum 28.98, convolution 28.73, depth 28.49, persistent tokens 27.63",
    ),
    _open("Titans Table 5 (on recall)", "momentum and retention matter"),
    _open("Titans Figure 6", "BABILong: Titans above larger models, in few-shot and after fine-tuning"),
    _open("Titans Figure 7", "a deeper memory has a lower perplexity, above all on long sequences"),
    _open("Titans Figure 8", "a deeper memory trains more slowly, linearly in its depth"),
    _open("Titans Figure 9", "training throughput of the neural memory is near that of other recurrent models"),
    _open(
        "arXiv:2411.12537",
        "negative eigenvalues let linear recurrences count: parity and modular arithmetic",
        "parity, scaled accuracy: DeltaNet in [0, 1] 0.017, in [-1, 1] 1.000",
    ),
    _open(
        "arXiv:2502.17416 (looped)",
        "on p-hop induction and addition a block that runs k times is nearly as good as k blocks",
    ),
    _open(
        "arXiv:2505.23884 (LaCT)",
        "small chunks reach under 5% of peak FLOP/s, chunks of 2K and more about 70%",
        "under 5%, about 70%",
    ),
    _open("arXiv:2510.09551 (Titans Revisited)", "with large chunks Titans does not always beat its baselines"),
    _open("arXiv:2602.21204 (ascent)", "gradient ascent in the memory works as well as descent"),
    _open("arXiv:2602.21204 (steps)", "more inner steps do not help"),
    _open(
        "arXiv:2606.03979 (Sleep)",
        "four levels with dreaming know SQuAD's passages better without context",
        "base 31.9, SEAL 43.2, four levels 46.2, without dreaming 36.2",
    ),
)
