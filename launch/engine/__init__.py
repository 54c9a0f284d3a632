"""The engine of one rank: scheduler, batches, model runner, sampler, and the loop that keeps all ranks in step."""
