/*
 * Everything that a C program can do wrong without undefined behaviour, and two threads with one engine. Ends with 0 if
 * every answer is the right one. Also compiled as C++.
 */

#include "respodiff.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition)                                                   \
    do {                                                                   \
        if (!(condition)) {                                                \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                       \
        }                                                                  \
    } while (0)

static respodiff_engine *engine = NULL;

/* The request fails with this code, and the message holds these words. */
static void refused(const char *request, respodiff_code code, const char *words) {
    respodiff_result *result = (respodiff_result *)1;
    respodiff_error *error = (respodiff_error *)1;
    respodiff_code answer = respodiff_generate(engine, request, NULL, NULL, &result, &error);
    if (answer != code || error == NULL || strstr(respodiff_error_message(error), words) == NULL) {
        fprintf(stderr, "%s: %d %s\n", request, (int)answer, error == NULL ? "" : respodiff_error_message(error));
        exit(1);
    }
    CHECK(result == NULL && respodiff_error_code(error) == code);
    CHECK(respodiff_error_subject(error) != NULL);
    respodiff_error_free(error);
    /* The text is not wanted. */
    CHECK(respodiff_generate(engine, request, NULL, NULL, &result, NULL) == code && result == NULL);
}

static respodiff_result *made(const char *request) {
    respodiff_result *result = NULL;
    respodiff_error *error = NULL;
    if (respodiff_generate(engine, request, NULL, NULL, &result, &error) != RESPODIFF_CODE_OK) {
        fprintf(stderr, "%s: %s\n", request, respodiff_error_message(error));
        exit(1);
    }
    CHECK(error == NULL && result != NULL);
    return result;
}

static void null_everywhere(void) {
    respodiff_engine *other = NULL;
    respodiff_concept *concept_ = NULL;
    respodiff_result *result = NULL;
    respodiff_error *error = NULL;
    const uint8_t *bytes = NULL;
    size_t length = 0;
    CHECK(strlen(respodiff_version()) >= 5);
    CHECK(respodiff_engine_open(NULL, NULL, &other, &error) == RESPODIFF_CODE_INVALID);
    CHECK(strcmp(respodiff_error_message(error), "model: is NULL") == 0);
    CHECK(strcmp(respodiff_error_subject(error), "model") == 0 && respodiff_error_advice(error) == NULL);
    respodiff_error_free(error);
    CHECK(respodiff_engine_open("demo", NULL, NULL, NULL) == RESPODIFF_CODE_INVALID);
    CHECK(respodiff_engine_info(NULL) == NULL);
    respodiff_engine_free(NULL);
    CHECK(respodiff_concept_open(NULL, &concept_, NULL) == RESPODIFF_CODE_INVALID && concept_ == NULL);
    CHECK(respodiff_concept_open("woman", NULL, NULL) == RESPODIFF_CODE_INVALID);
    CHECK(respodiff_concept_name(NULL) == NULL);
    respodiff_concept_free(NULL);
    CHECK(respodiff_engine_name_concept(NULL, "a", NULL, NULL) == RESPODIFF_CODE_INVALID);
    CHECK(respodiff_engine_name_concept(engine, NULL, NULL, NULL) == RESPODIFF_CODE_INVALID);
    CHECK(respodiff_engine_name_concept(engine, "a", NULL, NULL) == RESPODIFF_CODE_OK);
    CHECK(respodiff_generate(NULL, "{}", NULL, NULL, &result, NULL) == RESPODIFF_CODE_INVALID);
    CHECK(respodiff_generate(engine, NULL, NULL, NULL, &result, NULL) == RESPODIFF_CODE_INVALID);
    CHECK(respodiff_generate(engine, "{}", NULL, NULL, NULL, NULL) == RESPODIFF_CODE_INVALID);
    CHECK(respodiff_result_count(NULL) == 0 && respodiff_result_width(NULL, 0) == 0);
    CHECK(respodiff_result_height(NULL, 0) == 0 && respodiff_result_seed(NULL, 0) == 0);
    CHECK(respodiff_result_pixels(NULL, 0) == NULL && respodiff_result_parameters(NULL, 0) == NULL);
    CHECK(respodiff_result_warning(NULL, 0) == NULL);
    CHECK(respodiff_result_png(NULL, 0, &bytes, &length, NULL) == RESPODIFF_CODE_INVALID && bytes == NULL);
    respodiff_result_free(NULL);
    CHECK(respodiff_error_code(NULL) == RESPODIFF_CODE_OK && respodiff_error_message(NULL) == NULL);
    CHECK(respodiff_error_subject(NULL) == NULL && respodiff_error_advice(NULL) == NULL);
    respodiff_error_free(NULL);
}

static void cannot_open(const char *model, const char *options, respodiff_code code, const char *words) {
    respodiff_engine *other = (respodiff_engine *)1;
    respodiff_error *error = NULL;
    respodiff_code answer = respodiff_engine_open(model, options, &other, &error);
    if (answer != code || other != NULL || strstr(respodiff_error_message(error), words) == NULL) {
        fprintf(stderr, "%s: %d %s\n", model, (int)answer, error == NULL ? "" : respodiff_error_message(error));
        exit(1);
    }
    respodiff_error_free(error);
}

static void wrong_values(void) {
    cannot_open("\xff\xfe", NULL, RESPODIFF_CODE_INVALID, "UTF-8");
    cannot_open("/nowhere/at/all.safetensors", NULL, RESPODIFF_CODE_NOT_FOUND, "/nowhere");
    cannot_open(".", NULL, RESPODIFF_CODE_NOT_FOUND, "save_pretrained");
    cannot_open("demo", "{", RESPODIFF_CODE_INVALID, "JSON");
    cannot_open("demo", "{\"devise\": \"cpu\"}", RESPODIFF_CODE_INVALID, "`device`");
    cannot_open("demo", "{\"device\": \"tpu\"}", RESPODIFF_CODE_INVALID, "auto, cpu, cuda");
    cannot_open("demo", "{\"device\": \"cpu\", \"max_batch\": 0}", RESPODIFF_CODE_INVALID, "max_batch");
    cannot_open("demo", "{\"device\": \"cpu\", \"max_batch\": 257}", RESPODIFF_CODE_INVALID, "256");
    cannot_open("demo", "{\"precision\": \"fp4\"}", RESPODIFF_CODE_INVALID, "fp4");
    refused("\xc3\x28", RESPODIFF_CODE_INVALID, "UTF-8");
    refused("", RESPODIFF_CODE_INVALID, "JSON");
    refused("[]", RESPODIFF_CODE_INVALID, "JSON");
    refused("{}", RESPODIFF_CODE_INVALID, "prompt");
    refused("{\"prompt\": \"x\", \"negative-prompt\": \"y\"}", RESPODIFF_CODE_INVALID, "`negative_prompt`");
    refused("{\"prompt\": \"x\", \"model\": \"y\"}", RESPODIFF_CODE_INVALID, "not known");
    refused("{\"prompt\": \"x\\u0000\"}", RESPODIFF_CODE_INVALID, "NUL");
    refused("{\"prompt\": [\"x\", \"y\\u0000\"]}", RESPODIFF_CODE_INVALID, "NUL");
    refused("{\"prompt\": \"x\", \"width\": 63}", RESPODIFF_CODE_INVALID, "size: 63");
    refused("{\"prompt\": \"x\", \"size\": \"800000x8\"}", RESPODIFF_CODE_INVALID, "8192");
    refused("{\"prompt\": \"x\", \"width\": 18446744073709551615}", RESPODIFF_CODE_INVALID, "8192");
    refused("{\"prompt\": \"x\", \"n\": 18446744073709551615}", RESPODIFF_CODE_INVALID, "n: ");
    refused("{\"prompt\": [\"x\", \"y\"], \"n\": 5001}", RESPODIFF_CODE_INVALID, "10000");
    refused("{\"prompt\": \"x\", \"seed\": 18446744073709551615, \"n\": 2}", RESPODIFF_CODE_INVALID, "seed");
    refused("{\"prompt\": \"x\", \"num_inference_steps\": 0}", RESPODIFF_CODE_INVALID, "num_inference_steps: ");
    refused("{\"prompt\": \"x\", \"guidance_scale\": 1e300}", RESPODIFF_CODE_INVALID, "guidance_scale: ");
    refused("{\"prompt\": \"x\", \"sampler\": \"best\"}", RESPODIFF_CODE_INVALID, "best");
    refused("{\"prompt\": \"x\", \"concepts\": [\"womann\"]}", RESPODIFF_CODE_NOT_FOUND, "womann");
    refused("{\"prompt\": \"x\", \"concepts\": [\"/dev/null\"]}", RESPODIFF_CODE_DAMAGED, "/dev/null");
    refused("{\"prompt\": \"x\", \"concepts\": [{\"name\": \"woman\", \"weight\": 1e300}]}", RESPODIFF_CODE_INVALID,
            "finite");
    refused("{\"prompt\": \"x\", \"prompt_syntax\": \"b\"}", RESPODIFF_CODE_INVALID, "plain, a1111 or comfy");
    refused("{\"prompt\": \"[a|b]\", \"prompt_syntax\": \"a1111\"}", RESPODIFF_CODE_UNSUPPORTED, "prompt: `[a|b]`");
    refused("{\"prompt\": \"x\", \"clip_skip\": 0}", RESPODIFF_CODE_INVALID, "clip_skip: ");
    refused("{\"prompt\": \"x\", \"prompt_2\": \"y\"}", RESPODIFF_CODE_INVALID, "prompt_2: ");
    refused("{\"prompt\": \"x\", \"loras\": [\"/nowhere\"]}", RESPODIFF_CODE_NOT_FOUND, "/nowhere");
    refused("{\"prompt\": \"x\", \"loras\": [\"/dev/null\"]}", RESPODIFF_CODE_IO, "/dev/null");
    refused("{\"prompt\": \"x\", \"balance\": [\"woman\"]}", RESPODIFF_CODE_INVALID, "two concepts");
    refused("{\"prompt\": \"x\", \"size\": \"8192x8192\", \"n\": 256}", RESPODIFF_CODE_OUT_OF_MEMORY, "GiB");
}

struct limits {
    size_t calls, until;
};

static int32_t stop(void *user, size_t done, size_t total) {
    struct limits *limits = (struct limits *)user;
    CHECK(done <= total && total == 3 * 20);
    limits->calls++;
    return done >= limits->until;
}

static void cancelled(void) {
    const char *request = "{\"prompt\": \"a cook\", \"n\": 3, \"seed\": 1, \"num_inference_steps\": 20,"
                          " \"sampler\": \"DDIM\"}";
    size_t until;
    for (until = 0; until <= 40; until += 20) {
        struct limits limits = {0, 0};
        respodiff_result *result = NULL;
        respodiff_error *error = NULL;
        limits.until = until;
        CHECK(respodiff_generate(engine, request, stop, &limits, &result, &error) == RESPODIFF_CODE_CANCELLED);
        /* Three pictures advance at a time. */
        CHECK(result == NULL && limits.calls == (until + 2) / 3 + 1);
        CHECK(strstr(respodiff_error_message(error), "of 60 steps") != NULL);
        respodiff_error_free(error);
    }
}

static int equal(const respodiff_result *a, size_t i, const respodiff_result *b, size_t j) {
    const uint8_t *one = NULL, *two = NULL;
    size_t length = 0, other = 0;
    CHECK(respodiff_result_png(a, i, &one, &length, NULL) == RESPODIFF_CODE_OK);
    CHECK(respodiff_result_png(b, j, &two, &other, NULL) == RESPODIFF_CODE_OK);
    return length == other && memcmp(one, two, length) == 0;
}

static void pictures_and_concepts(void) {
    respodiff_concept *woman = NULL;
    respodiff_result *four, *named, *plain, *later;
    const uint8_t *bytes = (const uint8_t *)1;
    size_t length = 0, i, women = 0;
    CHECK(respodiff_concept_open("woman", &woman, NULL) == RESPODIFF_CODE_OK);
    CHECK(strcmp(respodiff_concept_name(woman), "a woman") == 0);
    CHECK(respodiff_engine_name_concept(engine, "hers", woman, NULL) == RESPODIFF_CODE_OK);
    respodiff_concept_free(woman); /* The engine keeps it. */
    four = made("{\"prompt\": [\"a doctor\", \"a nurse\"], \"n\": 2, \"seed\": 5, \"num_inference_steps\": 3,"
                " \"balance\": [\"hers\", \"man\"], \"width\": 72, \"height\": 64}");
    CHECK(respodiff_result_count(four) == 4);
    for (i = 0; i < 4; i++) {
        CHECK(respodiff_result_seed(four, i) == 5 + i);
        CHECK(respodiff_result_width(four, i) == 72 && respodiff_result_height(four, i) == 64);
        CHECK(respodiff_result_pixels(four, i) != NULL);
        women += strstr(respodiff_result_parameters(four, i), "\"a woman\"") != NULL;
    }
    CHECK(women == 2);
    CHECK(respodiff_result_pixels(four, 4) == NULL && respodiff_result_width(four, 4) == 0);
    CHECK(respodiff_result_png(four, 4, &bytes, &length, NULL) == RESPODIFF_CODE_INVALID && bytes == NULL);
    CHECK(respodiff_result_png(four, 0, &bytes, NULL, NULL) == RESPODIFF_CODE_INVALID);
    CHECK(respodiff_result_png(four, 0, NULL, &length, NULL) == RESPODIFF_CODE_INVALID);
    respodiff_result_free(four);

    named = made("{\"prompt\": \"a cook\", \"seed\": 1, \"num_inference_steps\": 3, \"concepts\": [\"hers\"]}");
    plain = made("{\"prompt\": \"a cook\", \"seed\": 1, \"num_inference_steps\": 3}");
    CHECK(!equal(named, 0, plain, 0));
    CHECK(respodiff_engine_name_concept(engine, "hers", NULL, NULL) == RESPODIFF_CODE_OK);
    refused("{\"prompt\": \"x\", \"concepts\": [\"hers\"]}", RESPODIFF_CODE_NOT_FOUND, "hers");
    /* After all that, the same picture. */
    later = made("{\"prompt\": \"a cook\", \"seed\": 1, \"num_inference_steps\": 3}");
    CHECK(equal(later, 0, plain, 0));
    respodiff_result_free(named);
    respodiff_result_free(plain);
    respodiff_result_free(later);

    named = made("{\"prompt\": \"a woman\", \"num_inference_steps\": 1, \"balance\": [\"woman\", \"man\"]}");
    CHECK(strstr(respodiff_result_warning(named, 0), "`woman`") != NULL && respodiff_result_warning(named, 1) == NULL);
    respodiff_result_free(named);
}

static void *work(void *argument) {
    const char *request = (const char *)argument;
    respodiff_result *first = made(request);
    int i;
    for (i = 0; i < 3; i++) {
        respodiff_result *again = made(request);
        CHECK(equal(first, 0, again, 0));
        respodiff_result_free(again);
    }
    return first;
}

static void threads(void) {
    const char *requests[2] = {
        "{\"prompt\": \"a doctor\", \"seed\": 1, \"num_inference_steps\": 4, \"concepts\": [\"woman\"]}",
        "{\"prompt\": \"a sheriff\", \"seed\": 2, \"num_inference_steps\": 5, \"size\": \"80x64\"}",
    };
    pthread_t ids[2];
    int i;
    for (i = 0; i < 2; i++) {
        CHECK(pthread_create(&ids[i], NULL, work, (void *)requests[i]) == 0);
    }
    for (i = 0; i < 2; i++) {
        void *together = NULL;
        respodiff_result *alone;
        CHECK(pthread_join(ids[i], &together) == 0);
        alone = made(requests[i]);
        CHECK(equal((respodiff_result *)together, 0, alone, 0));
        respodiff_result_free((respodiff_result *)together);
        respodiff_result_free(alone);
    }
}

/* A child of a process that has used the library gets errors, and does not wait forever. */
static void fork_is_refused(void) {
    int status = 0;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        respodiff_engine *other = NULL;
        alarm(20);
        refused("{\"prompt\": \"x\"}", RESPODIFF_CODE_UNSUPPORTED, "forked");
        CHECK(respodiff_engine_open("demo", "{\"device\": \"cpu\"}", &other, NULL) == RESPODIFF_CODE_UNSUPPORTED);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(void) {
    respodiff_error *error = NULL;
    respodiff_result *result;
    const char *options = "{\"device\": \"cpu\", \"max_batch\": 4}";
    if (respodiff_engine_open("demo", options, &engine, &error) != RESPODIFF_CODE_OK) {
        fprintf(stderr, "%s\n", respodiff_error_message(error));
        return 1;
    }
    CHECK(strstr(respodiff_engine_info(engine), "\"respodiff-demo\"") != NULL);
    null_everywhere();
    wrong_values();
    cancelled();
    pictures_and_concepts();
    threads();
    fork_is_refused();
    result = made("{\"prompt\": \"a cook\", \"num_inference_steps\": 1}");
    respodiff_engine_free(engine);
    CHECK(respodiff_result_width(result, 0) == 64);
    respodiff_result_free(result);
    puts("all is well");
    return 0;
}
