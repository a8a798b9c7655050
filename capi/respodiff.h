/*
 * respodiff: text to image with Stable Diffusion, fast, fair and safe.
 *
 * This file is generated from capi/src/lib.rs; `cargo run -p respodiff-capi --example header` writes it anew.
 *
 * Errors. A function that can fail returns a code, RESPODIFF_CODE_OK if it did what it says. The last argument takes an
 * error that holds the code, a text, and what to do about it, and is to be freed; NULL if the text is not wanted. It
 * and the other results are set to NULL when the call begins. NULL for any other pointer, and text that is not UTF-8,
 * are errors of the kind RESPODIFF_CODE_INVALID.
 *
 * Memory. What a function hands out is freed by the function of its type, once; NULL is freed without effect, and
 * anything freed twice is undefined behaviour. Texts, pixels and files live as long as the object that they are read
 * from. A result does not need its engine any more.
 *
 * Threads. An engine and a concept may be used from any number of threads at once. A result may be read from any number
 * of threads. An object is freed when no other thread uses it. The callback runs on the thread of the call. Work is
 * spread over threads of the library's own, which a fork does not copy: use it after a fork alone, or before it alone.
 * A process that has used it and was forked gets an error in place of a picture.
 *
 * The library prints nothing and handles no signals. It reads no environment variables but those of Hugging Face's
 * cache (HF_HOME, HF_TOKEN and others), for models that are named by their ids.
 */

#pragma once

#include <stddef.h>
#include <stdint.h>

/* The version that this header belongs to. Versions with equal first numbers (before 1.0: second ones) fit together. */
#define RESPODIFF_VERSION_MAJOR 0
#define RESPODIFF_VERSION_MINOR 1
#define RESPODIFF_VERSION_PATCH 0

/*
 The kinds of failure. More may come.
 */
typedef enum {
    /*
     It worked.
     */
    RESPODIFF_CODE_OK = 0,
    /*
     A value that can never work as it was given, or NULL, or text that is not UTF-8.
     */
    RESPODIFF_CODE_INVALID = 1,
    /*
     A file, folder, model, concept or device that is not there.
     */
    RESPODIFF_CODE_NOT_FOUND = 2,
    /*
     A file that is not what it should be.
     */
    RESPODIFF_CODE_DAMAGED = 3,
    /*
     Something whole and valid that this library, build or device cannot do.
     */
    RESPODIFF_CODE_UNSUPPORTED = 4,
    /*
     Two things that do not belong together, such as a concept and a model of another width.
     */
    RESPODIFF_CODE_MISMATCH = 5,
    /*
     More memory than there is. A smaller picture or batch may work.
     */
    RESPODIFF_CODE_OUT_OF_MEMORY = 6,
    /*
     The operating system refused to read or write.
     */
    RESPODIFF_CODE_IO = 7,
    /*
     The model server is out of reach or refuses. It may work later.
     */
    RESPODIFF_CODE_NETWORK = 8,
    /*
     A computation produced NaN or infinity. No picture is made of it.
     */
    RESPODIFF_CODE_NON_FINITE = 9,
    /*
     The device failed during its work. Open the engine again.
     */
    RESPODIFF_CODE_DEVICE_LOST = 10,
    /*
     The callback asked for the end.
     */
    RESPODIFF_CODE_CANCELLED = 11,
    /*
     A fault of the library.
     */
    RESPODIFF_CODE_INTERNAL = 12,
} respodiff_code;

/*
 A checkpoint on a device, ready to make pictures.
 */
typedef struct respodiff_engine respodiff_engine;

/*
 A failure.
 */
typedef struct respodiff_error respodiff_error;

/*
 A learnt concept, such as "a woman".
 */
typedef struct respodiff_concept respodiff_concept;

/*
 The pictures of a request.
 */
typedef struct respodiff_result respodiff_result;

/*
 Is told how many steps of how many are done, of all pictures of the request together. Any answer but 0 ends the run
 with RESPODIFF_CODE_CANCELLED. It must return, neither by an exception nor by longjmp.
 */
typedef int32_t (*respodiff_progress)(void *user, size_t done, size_t total);

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 The version of the library, such as "0.1.0".
 */
const char *respodiff_version(void);

/*
 Opens a checkpoint. `model` is "demo", a folder as diffusers writes it, a file, or a Hugging Face model id, which is
 taken from the local cache or downloaded. `options` is NULL or a JSON object: "device" ("auto", "cpu", "cuda",
 "cuda:1"), "precision" ("full", "bf16", "int8"), "tokenizer" ("fast", "slow"), "vae", "text_encoder" and
 "text_encoder_2" (folders or files in place of the checkpoint's own), "ema" (true for moving averages), "loras" (a
 list of files, or of {"file": "a.safetensors", "weight": 0.8}), "lora_folder" (a folder in which requests find such
 adapters by name), "embeddings" (a list of files and folders with learnt words), "vae_tile" (pixels: larger pictures
 are encoded and decoded in strips of that size squared, in less memory), "max_batch" (the most pictures that are
 made at once, 8 by default).

 # Safety
 The texts end with NUL; `engine` and `error` may be written, or are NULL.
 */
respodiff_code respodiff_engine_open(const char *model,
                                     const char *options,
                                     respodiff_engine **engine,
                                     respodiff_error **error);

/*
 Describes an engine by a JSON object with "version", "model", "device", "width", "height", "guidance_scale",
 "max_batch", "bottleneck", and lists of the "samplers" and of the demo's "concepts". NULL for NULL.

 # Safety
 `engine` is NULL or an engine that was not freed.
 */
const char *respodiff_engine_info(const respodiff_engine *engine);

/*
 Frees an engine, and with it the memory of its weights.

 # Safety
 `engine` is NULL or an engine that was not freed, and that no other thread uses.
 */
void respodiff_engine_free(respodiff_engine *engine);

/*
 Reads a concept file, or the demo's concept of that name if there is no such file. Requests may name files
 themselves; a concept of its own is read once, and goes by a name that the program chooses.

 # Safety
 The text ends with NUL; `concept` and `error` may be written, or are NULL.
 */
respodiff_code respodiff_concept_open(const char *path, respodiff_concept **concept, respodiff_error **error);

/*
 The prompt that a concept was trained for, such as "a woman". NULL for NULL.

 # Safety
 `concept` is NULL or a concept that was not freed.
 */
const char *respodiff_concept_name(const respodiff_concept *concept);

/*
 Frees a concept. Engines that know it keep it.

 # Safety
 `concept` is NULL or a concept that was not freed, and that no other thread uses.
 */
void respodiff_concept_free(respodiff_concept *concept);

/*
 Lets requests to an engine call a concept by a name, before any file of that name. NULL for `concept` forgets the
 name.

 # Safety
 `engine` and `concept` are NULL or were not freed; the text ends with NUL; `error` may be written, or is NULL.
 */
respodiff_code respodiff_engine_name_concept(const respodiff_engine *engine,
                                             const char *name,
                                             const respodiff_concept *concept,
                                             respodiff_error **error);

/*
 Makes the pictures of a request: a JSON object with the fields of `respodiff serve`, of which "prompt" alone is
 needed: "prompt" (a text or a list of texts), "negative_prompt", "n" (pictures of each prompt), "size" ("512x512")
 or "width" and "height", "seed", "num_inference_steps", "guidance_scale", "sampler", "concepts" (["woman", {"name":
 "old.safetensors", "weight": 0.8}]), "balance" (["woman", "man"], or a list of such lists), "loras" (adapters of
 this request: files, names in "lora_folder", or {"name": "a", "weight": 0.8}), "prompt_syntax" ("plain", "a1111",
 "comfy"), "clip_skip", and for SDXL "prompt_2" and "negative_prompt_2". A field that is not known is an error.
 `progress` is NULL or called between steps, with `user`.

 # Safety
 `engine` is NULL or was not freed; the text ends with NUL; `result` and `error` may be written, or are NULL.
 */
respodiff_code respodiff_generate(const respodiff_engine *engine,
                                  const char *request,
                                  respodiff_progress progress,
                                  void *user,
                                  respodiff_result **result,
                                  respodiff_error **error);

/*
 The number of pictures of a result; 0 for NULL.

 # Safety
 `result` is NULL or was not freed.
 */
size_t respodiff_result_count(const respodiff_result *result);

/*
 The width of a picture; 0 if there is none.

 # Safety
 `result` is NULL or was not freed.
 */
uint32_t respodiff_result_width(const respodiff_result *result, size_t index);

/*
 The height of a picture; 0 if there is none.

 # Safety
 `result` is NULL or was not freed.
 */
uint32_t respodiff_result_height(const respodiff_result *result, size_t index);

/*
 The seed of a picture; 0 if there is none.

 # Safety
 `result` is NULL or was not freed.
 */
uint64_t respodiff_result_seed(const respodiff_result *result, size_t index);

/*
 The pixels of a picture, height * width * 3 bytes: rows from the top, pixels from the left, red, green, blue. NULL
 if there is none.

 # Safety
 `result` is NULL or was not freed.
 */
const uint8_t *respodiff_result_pixels(const respodiff_result *result, size_t index);

/*
 Tells how a picture was made, with its concepts, by the JSON object that is in its file. NULL if there is none.

 # Safety
 `result` is NULL or was not freed.
 */
const char *respodiff_result_parameters(const respodiff_result *result, size_t index);

/*
 The PNG file of a picture, byte for byte the one that `respodiff sample` writes. It is made when it is first asked
 for.

 # Safety
 `result` is NULL or was not freed; `bytes`, `length` and `error` may be written, or are NULL.
 */
respodiff_code respodiff_result_png(const respodiff_result *result,
                                    size_t index,
                                    const uint8_t **bytes,
                                    size_t *length,
                                    respodiff_error **error);

/*
 A warning about a request that was answered, such as words of a prompt that were too many; NULL after the last one.

 # Safety
 `result` is NULL or was not freed.
 */
const char *respodiff_result_warning(const respodiff_result *result, size_t index);

/*
 Frees a result, and with it its pictures, files and texts.

 # Safety
 `result` is NULL or was not freed, and no other thread uses it.
 */
void respodiff_result_free(respodiff_result *result);

/*
 The kind of an error; RESPODIFF_CODE_OK for NULL.

 # Safety
 `error` is NULL or an error that was not freed.
 */
respodiff_code respodiff_error_code(const respodiff_error *error);

/*
 An error in one line: what it is about, what is wrong, what to do. NULL for NULL.

 # Safety
 `error` is NULL or an error that was not freed.
 */
const char *respodiff_error_message(const respodiff_error *error);

/*
 Names the field of the request, the argument, the file or the model that an error is about; empty if it is nothing
 in particular. NULL for NULL.

 # Safety
 `error` is NULL or an error that was not freed.
 */
const char *respodiff_error_subject(const respodiff_error *error);

/*
 Tells what to do about an error; NULL if there is nothing to tell.

 # Safety
 `error` is NULL or an error that was not freed.
 */
const char *respodiff_error_advice(const respodiff_error *error);

/*
 Frees an error.

 # Safety
 `error` is NULL or an error that was not freed.
 */
void respodiff_error_free(respodiff_error *error);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus
