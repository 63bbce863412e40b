// Prints llama.cpp's own logits, fp32, for token ids, then the tokens that it writes greedily.
//   llama_logits MODEL PREFIX_LENGTH NEW_TOKENS ID...  > logits of every id, (ids, vocabulary); then NEW_TOKENS int32
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "llama.h"

static int best(const float *logits, int count) {
    int found = 0;
    for (int i = 1; i < count; i++)
        if (logits[i] > logits[found]) found = i;
    return found;
}

int main(int argc, char **argv) {
    const int prefix = atoi(argv[2]), fresh = atoi(argv[3]), count = argc - 4;
    llama_log_set([](ggml_log_level level, const char *text, void *) { if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr); }, nullptr);
    llama_backend_init();
    llama_model_params how = llama_model_default_params();
    how.use_extra_bufts = false;  // weights rearranged for AMX stop at fp16 matrices of three dimensions
    llama_model *model = llama_model_load_from_file(argv[1], how);
    if (!model) return 2;
    llama_context_params settings = llama_context_default_params();
    settings.n_ctx = count + fresh + 8;
    settings.n_batch = settings.n_ubatch = count;
    settings.n_threads = settings.n_threads_batch = 1;  // small models: more would only wait for one another
    settings.type_k = settings.type_v = GGML_TYPE_F32;
    settings.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context *context = llama_init_from_model(model, settings);
    if (!context) return 3;
    const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<llama_token> ids;
    for (int i = 0; i < count; i++) ids.push_back(atoi(argv[4 + i]));
    llama_batch batch = llama_batch_init(count, 0, 1);
    for (int i = 0; i < count; i++) {
        batch.token[i] = ids[i];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    batch.n_tokens = count;
    if (llama_decode(context, batch)) return 4;
    for (int i = 0; i < count; i++) fwrite(llama_get_logits_ith(context, i), sizeof(float), vocabulary, stdout);
    llama_memory_clear(llama_get_memory(context), true);
    batch.n_tokens = prefix;
    for (int i = 0; i < prefix; i++) batch.logits[i] = i == prefix - 1;
    if (llama_decode(context, batch)) return 5;
    int position = prefix, last = prefix - 1;
    for (int i = 0; i < fresh; i++) {
        llama_token token = best(llama_get_logits_ith(context, last), vocabulary);
        fwrite(&token, sizeof token, 1, stdout);
        batch.n_tokens = 1;
        batch.token[0] = token;
        batch.pos[0] = position++;
        batch.logits[0] = 1;
        last = 0;
        if (llama_decode(context, batch)) return 6;
    }
    return 0;
}
