/* Runs a bundle from C: TensorFlow's C API, no Python, nothing of tfhalf.
 *
 *   predict FOLDER INPUT=SHAPE OUTPUT < numbers.f32 > answer.f32
 *
 * It reads raw float32 numbers and writes raw float32 numbers. INPUT=SHAPE is the tensor that takes them and their
 * shape, as serving_default_picture:0=6,16,16,3; OUTPUT is the tensor that gives them, as StatefulPartitionedCall:0.
 * `saved_model_cli show --dir FOLDER --tag_set serve --signature_def serving_default` prints both names.
 * The bundle isn't checked here: run tfhalf.verify first.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"

#define MAX_RANK 8

static void stop(const char* what, const char* why) {
  fprintf(stderr, "error: %s: %s\n", what, why);
  exit(1);
}

static void check(TF_Status* status, const char* what) {
  if (TF_GetCode(status) != TF_OK) stop(what, TF_Message(status));
}

/* The operation and the number of its output that a name as "picture:0" stands for. */
static TF_Output find(TF_Graph* graph, char* name) {
  TF_Output found = {NULL, 0};
  char* colon = strchr(name, ':');
  if (colon != NULL) {
    *colon = '\0';
    found.index = atoi(colon + 1);
  }
  found.oper = TF_GraphOperationByName(graph, name);
  if (found.oper == NULL) stop(name, "the graph has no such tensor");
  return found;
}

/* Splits "picture:0=6,16,16,3"; returns the rank. */
static int read_shape(char* argument, int64_t* shape) {
  int rank = 0;
  char* part = strchr(argument, '=');
  if (part == NULL) stop(argument, "give the shape too, as picture:0=6,16,16,3");
  *part++ = '\0';
  for (part = strtok(part, ","); part != NULL; part = strtok(NULL, ",")) {
    if (rank == MAX_RANK) stop(argument, "too many axes");
    shape[rank++] = atoll(part);
    if (shape[rank - 1] <= 0) stop(argument, "an axis must be 1 or more");
  }
  return rank;
}

int main(int argc, char** argv) {
  if (argc != 4) {
    fprintf(stderr, "usage: predict FOLDER INPUT=SHAPE OUTPUT < numbers.f32 > answer.f32\n");
    return 2;
  }
  int64_t shape[MAX_RANK];
  const int rank = read_shape(argv[2], shape);
  size_t bytes = sizeof(float);
  for (int axis = 0; axis < rank; ++axis) bytes *= (size_t)shape[axis];

  TF_Status* status = TF_NewStatus();
  TF_Graph* graph = TF_NewGraph();
  TF_SessionOptions* options = TF_NewSessionOptions();
  const char* tags[] = {"serve"};
  TF_Session* session = TF_LoadSessionFromSavedModel(options, NULL, argv[1], tags, 1, graph, NULL, status);
  check(status, argv[1]);
  const TF_Output input = find(graph, argv[2]), output = find(graph, argv[3]);

  TF_Tensor* given = TF_AllocateTensor(TF_FLOAT, shape, rank, bytes);
  if (fread(TF_TensorData(given), 1, bytes, stdin) != bytes) stop("stdin", "fewer numbers than the shape says");
  TF_Tensor* answer = NULL;
  TF_SessionRun(session, NULL, &input, &given, 1, &output, &answer, 1, NULL, 0, NULL, status);
  check(status, "the model failed");
  if (TF_TensorType(answer) != TF_FLOAT) stop(argv[3], "it isn't float32");
  if (fwrite(TF_TensorData(answer), 1, TF_TensorByteSize(answer), stdout) != TF_TensorByteSize(answer)) {
    stop("stdout", "can't be written");
  }

  TF_DeleteTensor(given);
  TF_DeleteTensor(answer);
  TF_CloseSession(session, status);
  TF_DeleteSession(session, status);
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  TF_DeleteStatus(status);
  return 0;
}
