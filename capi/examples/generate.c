/*
 * Two pictures of a doctor, a woman and a man, by the demo checkpoint: writes doctor-0.png and doctor-1.png.
 *
 *     cargo build --release -p respodiff-capi
 *     cc -std=c99 -I capi capi/examples/generate.c -L target/release -lrespodiff -o generate
 *     LD_LIBRARY_PATH=target/release ./generate [MODEL]
 */

#include "respodiff.h"
#include <stdio.h>

static int32_t progress(void *user, size_t done, size_t total) {
    int *shown = (int *)user;
    int percent = total == 0 ? 100 : (int)(100 * done / total);
    if (percent / 10 > *shown / 10) {
        fprintf(stderr, "%d %%\n", percent);
    }
    *shown = percent;
    return 0; /* Anything else ends the run. */
}

static int complain(respodiff_error *error) {
    fprintf(stderr, "error %d: %s\n", (int)respodiff_error_code(error), respodiff_error_message(error));
    respodiff_error_free(error);
    return 1;
}

static int save(const respodiff_result *result, size_t index) {
    const uint8_t *bytes = NULL;
    size_t length = 0;
    respodiff_error *error = NULL;
    char name[64];
    FILE *file;
    if (respodiff_result_png(result, index, &bytes, &length, &error) != RESPODIFF_CODE_OK) {
        return complain(error);
    }
    snprintf(name, sizeof name, "doctor-%d.png", (int)index);
    file = fopen(name, "wb");
    if (file == NULL || fwrite(bytes, 1, length, file) != length || fclose(file) != 0) {
        perror(name);
        return 1;
    }
    printf("%s\n", name);
    return 0;
}

int main(int count, char **arguments) {
    const char *model = count > 1 ? arguments[1] : "demo";
    const char *request = "{\"prompt\": \"a photo of a doctor\", \"n\": 2, \"seed\": 7, \"num_inference_steps\": 20,"
                          " \"balance\": [\"woman\", \"man\"]}";
    respodiff_engine *engine = NULL;
    respodiff_result *result = NULL;
    respodiff_error *error = NULL;
    int shown = 0, failed = 0;
    size_t i;

    if (respodiff_engine_open(model, "{\"device\": \"auto\"}", &engine, &error) != RESPODIFF_CODE_OK) {
        return complain(error);
    }
    printf("%s\n", respodiff_engine_info(engine));
    if (respodiff_generate(engine, request, progress, &shown, &result, &error) != RESPODIFF_CODE_OK) {
        respodiff_engine_free(engine);
        return complain(error);
    }
    respodiff_engine_free(engine); /* The result does not need it. */
    for (i = 0; respodiff_result_warning(result, i) != NULL; i++) {
        fprintf(stderr, "warning: %s\n", respodiff_result_warning(result, i));
    }
    for (i = 0; i < respodiff_result_count(result) && !failed; i++) {
        failed = save(result, i);
    }
    respodiff_result_free(result);
    return failed;
}
