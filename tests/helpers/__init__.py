"""What tests share: tiny models of ours and of other libraries, tokenizers, processes, damage."""
