"""Tokens a second of decoding at growing context, for each type of the KV cache.

    python benchmarks/depth.py MODEL.gguf [--depths 0,2048,8192,32768] [--kv-types f16,f32]

The cache is filled on the way from depth to depth, so the deepest costs one prefill of that length a cache type.
"""

from __future__ import annotations

from common import Work, model_path, parser, prompt, start, timed

from pyengine import Model


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--depths", default="0,1024,4096,8192,16384,32768")
    p.add_argument("--kv-types", default="f16")
    p.add_argument("--tokens", type=int, default=8, help="decoded each round")
    args = p.parse_args()
    depths = sorted({max(1, int(d)) for d in args.depths.split(",")})
    path = model_path(args)
    report = start(args, f"decode {args.tokens} at depth", path)
    with Model.open(path) as model:
        work = Work.of(model)
        ids = prompt(depths[-1] + args.tokens, model.n_vocab)
        per_position = model.n_layers * model.n_kv_heads * (model.head_dim_k + model.head_dim_v)
        for kv in args.kv_types.split(","):
            session = model.session(n_ctx=len(ids), threads=args.threads, kv_type=kv)
            kv_bytes, _ = model.session_bytes(n_ctx=len(ids), threads=args.threads, kv_type=kv)
            fill = 0.0
            for depth in depths:
                held = len(session)
                fill += timed(lambda s=session, d=depth, h=held: s.prefill(ids[h:d]))
                row = report.row(f"{kv}, depth {depth} (filled in {fill:.1f} s)", "tokens/s")
                for _ in range(args.rounds):
                    session.truncate(depth)
                    seconds = timed(lambda s=session, d=depth: [s.eval([i]) for i in ids[d : d + args.tokens]])
                    row.values.append(args.tokens / seconds)
                cache = kv_bytes / len(ids) * depth
                report.of_stream(row, (work.bytes + cache) * row.median * 1e-9)
            print(f"{kv}: {kv_bytes / len(ids) / per_position:.2f} bytes a value of the cache")
            session.close()
    report.finish(args)


if __name__ == "__main__":
    main()
